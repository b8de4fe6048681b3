# The guest's half of running a command: a POSIX shell script, handed to `sh -c` behind common.sh.
#
#   /bin/sh -c SCRIPT ocr-run BASE OPERATION ARGUMENT...
#
# It needs sh, cat, chown, head, id, mkdir, mv, rm, setsid, sleep, sort, su, sync, tail and wc, as coreutils and busybox
# have them, and /proc. It answers with one line, `ocr1 STATE ...`, and what the state carries; its exit code says
# nothing. What may be secret (command, environment, stdin) comes by stdin or in a staged file, never as an argument.
#
# BASE/ops/OPERATION.* is one run: `run` says who runs it, `pids` its sessions; `cmd` and `stdin` until it ends; `out`
# and `err`; `result` at its end.

# Lets go of all that others wait for the end of. By `exec`: for a function's redirection a shell keeps the old ones.
detach() {
    exec </dev/null >/dev/null 3>&- 4>&- 5>&- 6>&-
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
    done <&7
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

# Runs beside the command: bounds its output and ends it at its deadline. That works also when the command, or somebody
# else, removes our folder: what is needed was opened before, and word is given by a signal.
watch() {
    detach
    trap : HUP INT QUIT TERM
    prey=' '
    while sleep 1 || sleep 1; do
        clip out
        clip err
        clock
        [ "$now" -ge "$end" ] || continue
        ! alive $me || kill -USR1 $$
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

# Drops the oldest runs: 64 stay, and of those with an output too big to be told in one message the newest, and no more
# than 4 and than 32 MiB.
prune() {
    detach
    cd "$base/ops" || return
    n=0 big=0 sum=0
    for o in *.run; do
        o=${o%.run}
        read -r pid start was rest <"$o.run" || continue
        read -r state code ocut ecut size ended end <"$o.result" || end=
        if [ "$was" != "$boot" ]; then
            ended=0
        elif [ "$end" != . ]; then
            ! alive "$pid" "$start" || continue
            ended=0
        fi
        echo "$ended ${size:-0} $o"
    done | sort -rn | while read -r ended size o; do
        n=$((n + 1)) keep=1
        if [ "$size" -gt "$inline" ]; then
            big=$((big + 1)) sum=$((sum + size))
            [ "$big" = 1 ] || { [ "$big" -le 4 ] && [ "$sum" -le 33554432 ]; } || keep=
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
    read -r state code ocut ecut size ended end <"$d.result" || return 0
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
    given_up=$((now + deadline + 3000)) orphan=$((now + 1000))
    while :; do
        recall
        [ -e "$d.run" ] || say again
        clock
        if read -r pid start was rest <"$d.run" && [ -n "$was" ]; then
            [ "$was" = "$boot" ] || say rebooted
            alive "$pid" "$start" || {
                recall
                say died
            }
        elif [ "$now" -ge "$orphan" ]; then
            say died
        fi
        [ "$now" -lt "$given_up" ] || say again
        sleep 0.1 || sleep 1
    done
}

# Takes the lock, which says who has it: of all who ask, one makes the file.
take() {
    set -C
    echo "$me $boot $token" >"$d.run" && got=0 || got=1
    set +C
    return $got
}

# Waits until nothing works any more under an older token. By then ours may be an older one itself.
await() {
    [ "$token" != - ] || return 0
    clock
    given_up=$((now + deadline))
    while newest && { [ "$newest" -le "$token" ] || undo fenced; } && older; do
        clock
        [ "$now" -lt "$given_up" ] || undo busy
        sleep 0.1 || sleep 1
    done
}

run() {
    await
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
    exec 4>>"$d.pids" 5>>"$d.out" 6>>"$d.err" 7<"$d.pids"
    clock
    end=$((now + deadline))
    late=
    trap late=1 USR1
    watch &
    watch=$!
    exec 7<&-
    umask 022
    cd /
    : "${PATH:=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin}"
    export PATH
    # A session of its own: a signal to its whole group, whoever sends it, does not reach us, nor ours it.
    # Out of the agent's control group: systemd ends all that is in it when it restarts the agent.
    [ ! -w /sys/fs/cgroup/cgroup.procs ] || echo 0 >/sys/fs/cgroup/cgroup.procs
    # In the foreground: a shell's background command ignores interrupts for good. It appends, see clip. Its outputs
    # are set inside: the shell here would tell its end by a signal in them.
    if [ -z "$user" ]; then
        : "${HOME:=/root}" "${USER:=root}" "${LOGNAME:=root}"
        export HOME USER LOGNAME
        setsid /bin/sh -c 'exec >&5 2>&6 3>&- 5>&- 6>&-; echo $$ >&4; . "$1"' sh "$d.cmd" <"$in"
    else
        # Its own, so that it can open /dev/stdout; nobody but root gets through the folders to them.
        chown "$user" "$d.out" "$d.err"
        # su begins another session. The user may not open the command's file, but read what root opened.
        USER=$user LOGNAME=$user setsid /bin/sh -c 'exec >&5 2>&6 5>&- 6>&-; echo $$ >&4
            exec su -s /bin/sh "$1" -c '\''echo $$ >&4; eval "exec 3<&- 4>&-;$(cat <&3)"'\' sh "$user" \
            <"$in" 3<"$d.cmd"
    fi
    code=$? state=done
    umask 077
    [ "$late" ] || kill -KILL "$watch"
    wait "$watch"
    # Whoever ends us, ends the command too, as a guest that goes down does: no result is better than one that the
    # command did not choose.
    [ ! "$down" ] || say died
    if [ "$late" ]; then
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
    size=$((osize + esize))
    clock
    # One write: who reads sees nothing or all of it.
    echo "$state $code $ocut $cut $size $now ." >"$d.result"
    set -- "$base"/ops/*.run
    if [ $# -gt 128 ] || [ "$size" -gt "$inline" ]; then
        prune &
    fi
    tell "$state" "$code" "$ocut" "$cut"
}

base=$1 d=$1/ops/$2 deadline=$3 limit=$4 inline=$5 head=$6 total=$7 staged=$8 user=$9 since=${10} token=${11}
# The agent that listens may die before we end: a message to nobody would end us too, as would a signal to its
# group. Handlers are not inherited, as what is ignored is.
exec 3>&2 2>/dev/null
trap : HUP INT QUIT
down=
trap down=1 TERM
whoami
[ "$token" = - ] || raise || say fenced
if [ ! -e "$d.run" ]; then
    clock
    # The guest booted after this was first asked for; a run of that time may have left no trace.
    [ "$now" -ge "$since" ] || say rebooted
    [ -z "$user" ] || id -u "$user" >/dev/null || say nouser
    if take || { mkdir -p "$base/ops" && take; }; then run; fi
    [ -e "$d.run" ] || say fail "$( (true >"$d.run") 2>&1)"
fi
[ -z "$staged" ] || rm -f "$staged"
attach
