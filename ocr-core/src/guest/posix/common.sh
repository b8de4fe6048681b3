# What runner.sh and files.sh have in common; it stands before either of them.
#
# BASE (0700) holds
#   ops/     runs of commands, see runner.sh
#   act/     work on files, see files.sh
#   fence/   an empty file for the newest fencing token seen, named by it: twenty digits
#   in/      staged input: what is too long for one message
#
# `ops/ID.run` and `act/ID.run` say who works under which token: process, its start, boot, token or `-`. They are
# written before the token is compared with the newest, and the newest is made known before they are looked at. So of
# two requests at once the older sees that it is older, or the newer sees that the older works. A file that is empty as
# yet belongs to one that has not compared.
#
# `true >FILE` and not `: >FILE`: a special builtin whose redirection fails ends the shell.
# Programs are what it costs (a millisecond each, several in an emulated guest), so builtins do what they can.
# Lines that begin with # and indentation are cut before it is sent.

umask 077

say() {
    printf 'ocr1 %s\n' "$*"
    exit 0
}

# Sets $now, in hundredths of a second since the boot: a clock that nobody sets.
clock() {
    read -r up rest </proc/uptime
    now=$((${up%.*} * 100 + 1${up#*.} - 100))
}

# Sets $stat to the fields of process $1 from the third on. A process may have a line feed in its name.
stat() {
    stat=
    while read -r line; do stat="$stat$line "; done <"/proc/$1/stat"
    stat=${stat##*) }
}

# Whether process $1 that began at $2 is still there: a number alone may be another's by now.
alive() {
    began=$2
    stat "$1"
    set -- $stat
    [ "${20}" = "$began" ]
}

# Sets $me and $boot, which say who this is.
whoami() {
    read -r boot </proc/sys/kernel/random/boot_id
    stat $$
    set -- $stat
    me="$$ ${20}"
}

# Sets $newest to the newest token seen.
newest() {
    newest=0
    for f in "$base"/fence/*; do newest=${f##*/}; done
    [ "$newest" != '*' ] || newest=0
}

# Whether $token is no older than the newest, which it becomes. Names come in order. A newer one may be made meanwhile:
# none but older ones are removed, so the newest never falls.
raise() {
    newest
    [ "$newest" -le "$token" ] || return 1
    [ "$newest" -lt "$token" ] || return 0
    true >"$base/fence/$token" || { mkdir -p "$base/fence" && true >"$base/fence/$token"; } ||
        say fail "cannot write in $base"
    # A right that has moved on must not come back with the power.
    sync "$base/fence"
    newest
    [ "$newest" -le "$token" ] || return 1
    set --
    for f in "$base"/fence/*; do
        [ "${f##*/}" -ge "$token" ] || set -- "$@" "$f"
    done
    [ $# = 0 ] || rm -f "$@" || true
}

# Whether process $1 leads a session, as a command does whose runner was killed.
leads() {
    stat "$1"
    set -- $stat none none none none
    [ "$4" = "$leader" ] && [ "$1" != Z ]
}

# Whether what file $1 tells of works still.
works() {
    read -r pid start was theirs rest <"$1" || return 1
    [ "$was" = "$boot" ] || return 1
    ! alive "$pid" "$start" || return 0
    [ -s "${1%.run}.pids" ] || return 1
    while read -r leader; do
        ! leads "$leader" || return 0
    done <"${1%.run}.pids"
    return 1
}

# Whether something works under an older token.
older() {
    [ "$token" != - ] || return 1
    for r in "$base"/ops/*.run "$base"/act/*.run; do
        # One that has its result has ended.
        [ ! -s "${r%.run}.result" ] || continue
        theirs=-
        read -r pid start was theirs rest <"$r"
        [ "${theirs:--}" = - ] || [ "$theirs" -ge "$token" ] || ! works "$r" || return 0
    done
    return 1
}
