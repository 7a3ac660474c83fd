#compdef NAME
# Completion of NAME for zsh: put it into a directory of fpath as _NAME, or source it after compinit.
_NAME() {
    local line word found=1
    local -a whole open
    # The command that is being typed answers, be it in PATH or not.
    for line in "${(@f)$(VARIABLE=zsh ${~words[1]} -- "${(@)words[1,CURRENT]}" 2>/dev/null)}"; do
        [[ -n $line ]] || continue
        word=${${line%%$'\t'*}//:/\\:}
        # Nothing comes between these and what goes on behind them.
        if [[ $word == *[=/:] ]]; then
            open+=("$word:${line#*$'\t'}")
        else
            whole+=("$word:${line#*$'\t'}")
        fi
    done
    (( $#open )) && _describe -V NAME open -S '' && found=0
    (( $#whole )) && _describe -V NAME whole && found=0
    return found
}
if [[ $funcstack[1] == _NAME ]]; then
    _NAME "$@"
else
    compdef _NAME NAME
fi
