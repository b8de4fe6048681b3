# The guest's half of every operation: one POSIX shell script, handed to `sh -c` by the guest agent.
#
#   /bin/sh -c SCRIPT ocr-run MODE BASE ARGUMENT...
#
# It needs sh, cat, chmod, chown, find, head, id, ls, mkdir, mv, rm, setsid, sha256sum, sleep, su, tail and wc,
# as coreutils and busybox have them, and /proc. It answers with one line, `ocr1 STATE ...`, and what the state
# carries; its exit code says nothing. What may be secret (command, environment, stdin, content) comes by stdin or
# in a staged file, never as an argument.
#
# BASE (0700) holds
#   ops/OPERATION.*  one run: `run` says who runs it, `pids` its sessions; `cmd` and `stdin` until it ends; `out`
#                    and `err`; `late` past its deadline; `result` at its end
#   in/              staged input that is too big for one message of the agent
#
# `true >FILE` and not `: >FILE`: a special builtin whose redirection fails ends the shell.
# Programs are what it costs (a millisecond each, several in an emulated guest), so builtins do what they can.
# Lines that begin with # and indentation are cut before it is sent.

umask 077
mode=$1 base=$2
shift 2

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

# Keeps the first $limit bytes of output $1 aside and empties the file, under the writer's hands: it appends.
clip() {
    if [ ! -e "$d.$1.kept" ]; then
        [ "$(wc -c <"$d.$1")" -gt "$limit" ] || return 0
        head -c "$limit" "$d.$1" >"$d.$1.part"
        mv -f "$d.$1.part" "$d.$1.kept"
    fi
    true >"$d.$1"
}

# Sets $cut of output $1 at the end: whether there was more than $limit. $2 is where the last writer was.
settle() {
    cut=0
    [ "$2" -le "$limit" ] || clip "$1"
    if [ -e "$d.$1.kept" ]; then
        mv -f "$d.$1.kept" "$d.$1"
        cut=1
    fi
}

# Adds to $prey all processes of its sessions, and all children, which may have begun a session of their own.
hunt() {
    while read -r sid; do
        case $prey in *" $sid "*) ;; *) prey="$prey$sid " ;; esac
    done <"$d.pids"
    more=1
    while [ "$more" ]; do
        more=
        for p in /proc/[0-9]*; do
            p=${p#/proc/}
            case $prey in *" $p "*) continue ;; esac
            stat "$p"
            set -- $stat
            case $prey in *" ${2:-none} "* | *" ${4:-none} "*)
                prey="$prey$p "
                more=1
                ;;
            esac
        done
    done
}

# Runs beside the command: bounds its output and ends it at its deadline.
watch() {
    trap : HUP INT QUIT TERM
    prey=' '
    while sleep 1 || sleep 1; do
        clip out
        clip err
        clock
        [ "$now" -ge "$end" ] || continue
        true >"$d.late"
        hunt
        kill -TERM $prey
        sleep 1
        # Twice: one may have forked while the first hunt went on.
        hunt
        kill -KILL $prey
        hunt
        kill -KILL $prey
        break
    done
}

# Drops the oldest runs: 64 stay, and 4 of those with an output too big to be told in one message.
prune() {
    n=0 big=0
    cd "$base/ops" || return
    for o in $(ls -t); do
        case $o in *.run) o=${o%.run} ;; *) continue ;; esac
        read -r state code ocut ecut size end <"$o.result" || end=
        if [ "$end" != . ]; then
            read -r pid start was <"$o.run" || continue
            [ "$was" != "$boot" ] || ! alive "$pid" "$start" || continue
            size=0
        fi
        n=$((n + 1)) keep=1
        if [ "$size" -gt "$inline" ]; then
            big=$((big + 1))
            [ "$big" -le 4 ] || keep=
        fi
        # `run` goes last: while it is there nobody runs this again.
        [ "$keep" ] && [ "$n" -le 64 ] || {
            rm -f "$o".[!r]* "$o.result"
            rm -f "$o.run"
        }
    done
}

# Tells result $1..$4 (state, exit code, whether stdout and stderr were cut), and as much of the outputs as one answer
# may have: stdout after the line, stderr by ours. One byte more tells that this is not all.
tell() {
    printf 'ocr1 %s %s %s %s\n' "$@"
    [ ! -s "$d.out" ] || head -c "$((inline + 1))" "$d.out"
    [ ! -s "$d.err" ] || head -c "$((inline + 1))" "$d.err" >&3
    exit 0
}

# Tells the result when there is one. A result without its dot was cut by a crash.
recall() {
    read -r state code ocut ecut size end <"$d.result" || return 0
    [ "$end" != . ] || tell "$state" "$code" "$ocut" "$ecut"
}

# Nothing was run: leaves no trace of it, and says why.
undo() {
    rm -f "$d".*
    say "$@"
}

# Waits for the end of a run that another call began.
attach() {
    clock
    end=$((now + deadline + 3000)) orphan=$((now + 1000))
    while :; do
        recall
        [ -e "$d.run" ] || say again
        clock
        if read -r pid start was <"$d.run" && [ -n "$was" ]; then
            [ "$was" = "$boot" ] || say rebooted
            alive "$pid" "$start" || {
                recall
                say died
            }
        elif [ "$now" -ge "$orphan" ]; then
            say died
        fi
        [ "$now" -lt "$end" ] || say again
        sleep 0.1 || sleep 1
    done
}

# Takes the lock, which says who has it: of all who ask, one makes the file.
take() {
    set -C
    echo "$me $boot" >"$d.run" && got=0 || got=1
    set +C
    return $got
}

run() {
    in=/dev/null
    if [ -z "$staged" ] && [ "$head" = "$total" ]; then
        text=
        if [ "$head" -lt 2000 ]; then
            # Byte by byte, and still quicker than a program.
            while IFS= read -r line; do
                text="$text$line
"
            done
            text=$text$line
        else
            text=$(cat)
        fi
        # The mark at the end proves that all of it came: half a command must never run.
        case $text in *'#ocr') ;; *) undo again ;; esac
        printf %s "${text%#ocr}" >"$d.cmd" || undo fail "cannot write in $base"
        text=
    else
        all=$staged
        if [ -z "$all" ]; then
            all=$d.all
            cat >"$all" || undo fail "cannot write in $base"
        fi
        [ "$(wc -c <"$all")" = "$total" ] || undo again
        head -c "$head" "$all" >"$d.cmd" && tail -c "+$((head + 1))" "$all" >"$d.stdin" ||
            undo fail "cannot write in $base"
        rm -f "$all"
        in=$d.stdin
    fi
    true 4>"$d.pids" 5>"$d.out" 6>"$d.err" || undo fail "cannot write in $base"
    exec 4>>"$d.pids" 5>>"$d.out" 6>>"$d.err"
    clock
    end=$((now + deadline))
    watch </dev/null >/dev/null 3>&- 4>&- 5>&- 6>&- &
    watch=$!
    umask 022
    cd /
    : "${PATH:=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin}"
    export PATH
    # A session of its own: a signal to its whole group, whoever sends it, does not reach us, nor ours it.
    # In the foreground: a shell's background command ignores interrupts for good. It appends, see clip.
    if [ -z "$user" ]; then
        : "${HOME:=/root}" "${USER:=root}" "${LOGNAME:=root}"
        export HOME USER LOGNAME
        setsid /bin/sh -c 'echo $$ >&4; . "$1"' sh "$d.cmd" <"$in" >&5 2>&6 3>&- 5>&- 6>&-
    else
        # Its own, so that it can open /dev/stdout; nobody but root gets through the folders to them.
        chown "$user" "$d.out" "$d.err"
        # su begins another session. The user may not open the command's file, but read what root opened.
        USER=$user LOGNAME=$user setsid /bin/sh -c 'echo $$ >&4
            exec su -s /bin/sh "$1" -c '\''echo $$ >&4; eval "exec 3<&- 4>&-;$(cat <&3)"'\' sh "$user" \
            <"$in" >&5 2>&6 3<"$d.cmd" 5>&- 6>&-
    fi
    code=$? state=done
    umask 077
    [ -e "$d.late" ] || kill -KILL "$watch"
    wait "$watch"
    if [ -e "$d.late" ]; then
        state=late
    elif [ -n "$user" ]; then
        { read -r first && read -r second; } <"$d.pids" || state=refused
    fi
    # Emptied, not removed: that costs no fork.
    true >"$d.cmd"
    [ "$in" = /dev/null ] || true >"$in"
    # Where a file's last writer was is its size, unless somebody opened it anew, and costs no program.
    read -r name osize </proc/self/fdinfo/5
    read -r name esize </proc/self/fdinfo/6
    settle out "$osize"
    ocut=$cut
    settle err "$esize"
    [ "$osize" -ge "$esize" ] || osize=$esize
    # One write: who reads sees nothing or all of it.
    echo "$state $code $ocut $cut $osize ." >"$d.result"
    set -- "$base"/ops/*.run
    if [ $# -gt 128 ] || [ "$osize" -gt "$inline" ]; then
        prune </dev/null >/dev/null 3>&- 4>&- 5>&- 6>&- &
    fi
    tell "$state" "$code" "$ocut" "$cut"
}

case $mode in
exec)
    d=$base/ops/$1 deadline=$2 limit=$3 inline=$4 head=$5 total=$6 staged=$7 user=$8 since=$9
    # The agent that listens may die before we end: a message to nobody would end us too, as would a signal to its
    # group. Handlers are not inherited, as what is ignored is.
    exec 3>&2 2>/dev/null
    trap : HUP INT QUIT TERM
    read -r boot </proc/sys/kernel/random/boot_id
    if [ ! -e "$d.run" ]; then
        clock
        # The guest booted after this was first asked for; a run of that time may have left no trace.
        [ "$now" -ge "$since" ] || say rebooted
        [ -z "$user" ] || id -u "$user" >/dev/null || say nouser
        stat $$
        set -- $stat
        me="$$ ${20}"
        if take || { mkdir -p "$base/ops" && take; }; then run; fi
        [ -e "$d.run" ] || say fail "$( (true >"$d.run") 2>&1)"
    fi
    [ -z "$staged" ] || rm -f "$staged"
    attach
    ;;
stage)
    export LC_ALL=C
    error=$(mkdir -p "$base/in" 2>&1) || say fail "$error"
    # What a host that died has left.
    find "$base/in" -type f -mtime +0 -exec rm -f {} +
    error=$( (true >"$base/in/$1") 2>&1) || say fail "$error"
    say ok
    ;;
put)
    export LC_ALL=C
    path=$1 staged=$2 sum=$3 bits=$4 owner=$5 parents=$6 t=${1%/*}/.ocr-$7
    dir=${path%/*}/
    [ -z "$staged" ] || trap 'rm -f "$staged"' EXIT
    trap 'exit 1' HUP INT PIPE TERM
    [ -z "$owner" ] || id -u "$owner" >/dev/null 2>&1 || say noowner
    [ ! -d "$path" ] || say folder
    if [ ! -d "$dir" ]; then
        [ "$parents" = 1 ] || say noparent
        error=$( (umask 022 && mkdir -p "$dir") 2>&1) || say fail "$error"
    fi
    trap 'rm -f "$t" ${staged:+"$staged"}' EXIT
    error=$( (set -C && cat ${staged:+"$staged"} >"$t") 2>&1) || say fail "$error"
    got=$(sha256sum <"$t")
    [ "${got%% *}" = "$sum" ] || say mismatch
    [ -z "$owner" ] || error=$(chown "$owner:" "$t" 2>&1) || say fail "$error"
    error=$(chmod "$bits" "$t" 2>&1) || say fail "$error"
    error=$(mv -f "$t" "$path" 2>&1) || say fail "$error"
    say ok
    ;;
get)
    export LC_ALL=C
    [ ! -d "$1" ] || say folder
    [ -e "$1" ] || say missing
    [ -f "$1" ] || say special
    size=$( (wc -c <"$1") 2>&1) || say fail "$size"
    [ "$size" -le "$2" ] || say over "$size"
    [ "$size" -le "$3" ] || say large "$size"
    printf 'ocr1 file %s\n' "$size"
    [ "$size" = 0 ] || head -c "$size" "$1"
    exit 0
    ;;
remove)
    export LC_ALL=C
    [ -e "$1" ] || [ -L "$1" ] || say missing
    [ -L "$1" ] || [ ! -d "$1" ] || say folder
    error=$(rm -f "$1" 2>&1) || say fail "$error"
    say ok
    ;;
esac
