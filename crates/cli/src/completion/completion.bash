# Completion of NAME for bash: source it, or put it into /usr/share/bash-completion/completions/NAME.
_NAME() {
    # The command that is being typed answers, be it in PATH or not.
    local answers="${1/#\~/$HOME}"
    mapfile -t COMPREPLY < <(VARIABLE=bash "$answers" -- "${COMP_LINE:0:COMP_POINT}" "$2" 2>/dev/null)
    # Nothing comes between these and what goes on behind them.
    if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[=/:] ]]; then
        compopt -o nospace
    fi
}
complete -o bashdefault -F _NAME NAME
