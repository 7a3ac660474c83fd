//! Completion, by the shells themselves where they are installed.

// Clippy's exception for tests does not reach the functions that they call.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout)]

use std::process::{Command, Stdio};

use dunlin::PARAMETERS;

const DUNLIN: &str = env!("CARGO_BIN_EXE_dunlin");

/// What a shell prints that runs `script`, with the command under test as its first argument; nothing where there is no
/// such shell.
fn run(shell: &str, flags: &[&str], script: &str, arguments: &[&str]) -> Option<String> {
    let mut command = Command::new(shell);
    command.args(flags).args(["-c", script]);
    if shell != "fish" {
        command.arg(shell);
    }
    let output = command.arg(DUNLIN).args(arguments).stdin(Stdio::null()).output();
    let Ok(output) = output else {
        println!("skipped: no {shell}");
        return None;
    };
    let text = String::from_utf8(output.stdout).unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && error.is_empty(), "{shell} {arguments:?}: {text}{error}");
    Some(text)
}

/// Calls the function that bash would, with the line broken into words as bash breaks it.
const BASH: &str = r#"
    source <("$1" completion bash) || exit
    complete -p dunlin | grep -q -- '-F _dunlin' || exit
    compopt() { echo "compopt $*"; }
    COMP_LINE=$2 COMP_POINT=${#2}
    _dunlin "$1" "$3" "" || exit
    printf '%s\n' "${COMPREPLY[@]}"
"#;

#[test]
fn bash() {
    let all: String = PARAMETERS.iter().map(|info| format!("{}=\n", info.name)).collect();
    for (line, broken, wanted) in [
        ("dunlin moni", "moni", "monitor\n"),
        ("dunlin completion ", "", "bash\nzsh\nfish\n--help\n--version\n"),
        ("dunlin migrate --set ", "", &*all),
        ("dunlin migrate --set downt", "downt", "compopt -o nospace\ndowntime-limit=\n"),
        ("dunlin migrate --set multifd-compression=", "", "none\nlz4\nzstd\n"),
        ("dunlin migrate --set multifd-compression=z", "z", "zstd\n"),
        ("dunlin demo --set xbzrle=on --set downtime-limit=3", "3", "300ms\n"),
        ("dunlin migrate --qmp unix:/de", "/de", "compopt -o nospace\n/dev/\n"),
    ] {
        if let Some(said) = run("bash", &["--norc", "--noprofile"], BASH, &[line, broken]) {
            assert_eq!(said, wanted, "{line}");
        }
    }
}

/// Has the widget's function say what it would offer, in the place of the line editor.
const ZSH: &str = r#"
    autoload -Uz compinit && compinit -u -D
    source <("$1" completion zsh) || exit
    [[ $_comps[dunlin] == _dunlin ]] || exit
    _describe() { local -a offered=("${(@P)3}"); print -rl -- "${(@)offered%%:*}${4:+ no blank}"; }
    command=$1; shift; words=("$command" "$@"); CURRENT=$#words
    _dunlin
"#;

#[test]
fn zsh() {
    for (words, wanted) in [
        (&["moni"][..], "monitor\n"),
        (&["migrate", "--set", "downt"], "downtime-limit= no blank\n"),
        (
            &["migrate", "--set", "multifd-compression="],
            "multifd-compression=none\nmultifd-compression=lz4\nmultifd-compression=zstd\n",
        ),
    ] {
        if let Some(said) = run("zsh", &["-f"], ZSH, words) {
            assert_eq!(said, wanted, "{words:?}");
        }
    }
}

/// fish tells by itself what it would offer; the command must be in its path.
const FISH: &str = r#"
    set -x PATH (dirname $argv[1]) $PATH
    dunlin completion fish | source
    complete --do-complete $argv[2] | string replace --regex '\t.*' ''
    true
"#;

#[test]
fn fish() {
    for (line, wanted) in [
        ("dunlin moni", "monitor\n"),
        ("dunlin migrate --set downt", "downtime-limit=\n"),
        ("dunlin migrate --set multifd-compression=z", "multifd-compression=zstd\n"),
    ] {
        if let Some(said) = run("fish", &["--no-config"], FISH, &[line]) {
            assert_eq!(said, wanted, "{line}");
        }
    }
}
