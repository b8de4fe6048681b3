# Runs one operation in a guest, once, and keeps its result.
#
# Wants: BASE OP DEADLINE LIMIT INLINE LONG STDIN USER STAGED PRUNE, and on stdin a header line and the command's stdin
#   BASE      folder of the results; OP: name of this operation
#   DEADLINE  in 1/100 s; LIMIT: bytes kept of stdout and of stderr; INLINE: bytes of them to print
#   LONG      length of the header when it is too long for `read`, else 0; STDIN: length of the stdin
#   USER      who runs it, may be empty; STAGED: 1 when the input is in BASE/OP.in instead
#   PRUNE     1 when old results shall be forgotten afterwards
# The header is a line of shell, with $ocr_nl for newlines: exports, then the command.
# Prints `ocr1 VERDICT` and the stdout, and to stderr the stderr. Verdicts:
#   exit CODE OUT ERR  it ended; OUT and ERR are `all`, or `cut` when the rest was let go
#   late OUT ERR       it was ended at the deadline
#   nouser | garbled | full | rebooted | lost | forgotten
# Leaves in BASE: OP.lock (boot, process and its birth), OP.out, OP.err, OP.end (the verdict).
# Plain sh, few programs: in an emulated guest starting one takes 10 ms and more.
mask=$(umask)
umask 077
base=$1 op=$2 deadline=$3 limit=$4 inline=$5 long=$6 stdin=$7 user=$8 staged=$9
shift 9
prune=$1
f=$base/$op
exec 5>&2 2>/dev/null
trap : PIPE HUP
down=
trap 'down=1' TERM

finish() {
    echo "ocr1 $*"
    exit 0
}

# The fields of process $1, from its state on, into $line.
stats() {
    read -r line <"/proc/$1/stat" && line=${line##*) }
}

# Whether process $1, born at $2, lives.
lives() {
    born=$2
    stats "$1" || return 1
    set -- $line
    [ "$1" != Z ] && [ "${20}" = "$born" ]
}

# Sleeps $1 / 100 s.
nap() {
    c=$(($1 % 100))
    [ $c -gt 9 ] || c=0$c
    sleep "$(($1 / 100)).$c" || sleep 1
}

# The time in 1/100 s into $now.
clock() {
    read -r now line </proc/uptime
    now=${now%.*}${now#*.}
}

# Prints verdict $@ with the output.
answer() {
    o=all e=all
    [ ! -e "$f.outk" ] || o=cut
    [ ! -e "$f.errk" ] || e=cut
    [ -e "$f.out" ] || finish forgotten
    echo "ocr1 $* $o $e"
    [ $o = all ] && o=$f.out || o=$f.outk
    [ $e = all ] && e=$f.err || e=$f.errk
    [ ! -s "$o" ] || head -c "$inline" "$o"
    [ ! -s "$e" ] || head -c "$inline" "$e" >&5
    exec >/dev/null 5>&-
    [ "$prune" != 1 ] || forget </dev/null &
    exit 0
}

# Waits for whoever runs this operation, and answers as he does.
attach() {
    [ "$staged" = 0 ] || rm -f "$f.in"
    tries=0 pause=2
    until [ -s "$f.end" ]; do
        boot_then=
        read -r boot_then pid birth <"$f.lock"
        if [ -z "$boot_then" ]; then
            # He writes it at once, unless the disk is full.
            tries=$((tries + 1))
            [ $tries -lt 20 ] || finish full
        elif [ "$boot_then" != "$boot" ]; then
            finish rebooted
        elif ! lives "$pid" "$birth"; then
            # He may have ended since we looked.
            [ -s "$f.end" ] || finish lost
            break
        fi
        nap $pause
        [ $pause -gt 20 ] || pause=$((pause * 2))
    done
    read -r verdict <"$f.end"
    answer $verdict
}

# Forgets old results: all but the newest 200, and outputs beyond 32 MiB in all.
forget() {
    n=0 kib=0
    ls -lt "$base" | while read -r mode links owner group size month day time name; do
        o=$base/${name%%.*}
        case $name in
            *.lock)
                n=$((n + 1))
                [ $n -gt 200 ] || continue
                read -r boot_then pid birth <"$o.lock"
                [ -s "$o.end" ] || [ "$boot_then" != "$boot" ] || ! lives "$pid" "$birth" || continue
                rm -f "$o".*
                ;;
            *.out* | *.err*)
                kib=$((kib + size / 1024))
                [ $n -lt 1 ] || [ $kib -lt 32768 ] || [ "$size" -lt 65536 ] || [ ! -s "$o.end" ] || rm -f "$o".out* "$o".err*
                ;;
            *.*)
                # Input of somebody who never came to his lock.
                [ $n -lt 4 ] || [ -e "$o.lock" ] || rm -f "$base/$name"
                ;;
        esac
    done
}

# Keeps the first LIMIT bytes of $1 in $1k and lets the rest go.
shorten() {
    [ -s "$1" ] || return 0
    if [ ! -e "$1k" ]; then
        [ "$(wc -c <"$1")" -gt "$limit" ] || return 0
        head -c "$limit" "$1" >"$1t" && mv "$1t" "$1k" || return 0
    fi
    : >"$1"
}

# Sends signal $1 to all processes of the command: children of this shell and of its children, and whoever is in their
# sessions. Fails when there are none.
hunt() {
    signal=$1 prey= more=1
    while [ $more ]; do
        more=
        for p in /proc/[0-9]*; do
            p=${p#/proc/}
            [ "$p" != $$ ] && [ "$p" != "$self" ] || continue
            case "$prey " in *" $p "*) continue ;; esac
            stats "$p" || continue
            set -- $line
            [ "$1" != Z ] && [ "$2" != "$self" ] || continue
            case "$prey $$ " in *" $2 "* | *" $4 "*) prey="$prey $p" more=1 ;; esac
        done
    done
    [ "$prey" ] && kill -$signal $prey
    [ "$prey" ]
}

# Runs beside the command: bounds its output, and ends it at the deadline.
guard() {
    trap '' TERM
    read -r self line </proc/self/stat
    clock
    end=$((now + deadline)) pause=25
    while [ "$now" -lt $end ]; do
        left=$((end - now))
        [ $left -lt $pause ] || left=$pause
        nap $left
        shorten "$f.out"
        shorten "$f.err"
        [ $pause -ge 100 ] || pause=$((pause * 2))
        clock
    done
    hunt 0 || return
    echo late >"$f.late"
    hunt TERM
    n=0
    while [ $n -lt 20 ] && hunt 0; do
        nap 10
        n=$((n + 1))
    done
    n=0
    while [ $n -lt 50 ] && hunt KILL; do
        nap 10
        n=$((n + 1))
    done
}

if [ ! -d "$base" ]; then
    (umask 022 && mkdir -p "${base%/*}")
    mkdir "$base"
fi
read -r boot </proc/sys/kernel/random/boot_id
stats $$
birth=$line

# --- input: all of it, before anything is promised ---
[ "$staged" = 0 ] || exec <"$f.in"
if [ "$long" = 0 ]; then
    read -r header || finish garbled
    read_header='read -r ocr_h <&3'
    [ "$stdin" = 0 ] || cat >"$f.i$$"
else
    cat >"$f.p$$"
    [ "$(wc -c <"$f.p$$")" -eq $((long + 1 + stdin)) ] || { rm -f "$f.p$$"; finish garbled; }
    header=$(head -c "$long" "$f.p$$")
    read_header='ocr_h=$(cat <&3)'
    [ "$stdin" = 0 ] || tail -c "$stdin" "$f.p$$" >"$f.i$$"
    rm -f "$f.p$$"
fi
exec </dev/null
if [ "$stdin" != 0 ]; then
    size=$(wc -c <"$f.i$$")
    exec <"$f.i$$"
    rm -f "$f.i$$"
    [ "$size" -eq "$stdin" ] || finish garbled
fi
[ -z "$user" ] || id -u "$user" >/dev/null || finish nouser

# --- the lock: who makes the file runs the command ---
set -- $birth
set -C
echo "$boot $$ ${20}" >"$f.lock"
made=$?
set +C
if [ $made != 0 ]; then
    [ -e "$f.lock" ] || finish full
    attach
fi
[ "$staged" = 0 ] || rm -f "$f.in"
# Out of the agent's control group, or systemd ends us with the agent.
[ ! -w /sys/fs/cgroup/cgroup.procs ] || echo 0 >/sys/fs/cgroup/cgroup.procs

# --- the command, reading its header from a pipe: arguments are seen by everybody ---
inner="umask $mask
ocr_nl='
'
$read_header
exec 3<&-
eval \"\$ocr_h\""
set -- sh -c "$inner"
[ -z "$user" ] || set -- su -s /bin/sh -c "$inner" "$user"
guard </dev/null >/dev/null 5>&- &
guard=$!
"$@" >>"$f.out" 2>>"$f.err" 5>&- 3<<END
$header
END
code=$?
# When the guest goes down, the command's end is not its own: no result is better than a wrong one.
[ -z "$down" ] || finish lost
verdict="exit $code"
if [ -e "$f.late" ]; then
    wait $guard
    verdict=late
else
    kill -KILL $guard
    wait $guard
fi
echo "$verdict" >"$f.end"
answer $verdict
