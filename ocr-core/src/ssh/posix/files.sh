# The guest's half of moving files: a POSIX shell script, handed to `sh -c` by the guest agent.
#
#   /bin/sh -c SCRIPT ocr-file MODE BASE ARGUMENT...
#
# It needs sh, cat, chmod, chown, find, head, id, mkdir, mv, rm, sha256sum and wc, as coreutils and busybox have them, and
# /proc. It answers as runner.sh does. Content comes by stdin or in a staged file.

umask 077
export LC_ALL=C
mode=$1 base=$2
shift 2

say() {
    printf 'ocr1 %s\n' "$*"
    exit 0
}

case $mode in
stage)
    error=$(mkdir -p "$base/in" 2>&1) || say fail "$error"
    # What a host that died has left.
    find "$base/in" -type f -mtime +0 -exec rm -f {} +
    error=$( (true >"$base/in/$1") 2>&1) || say fail "$error"
    say ok
    ;;
put)
    path=$1 staged=$2 sum=$3 bits=$4 owner=$5 parents=$6
    # This may be asked twice, and the first may go on still.
    dir=${path%/*}/ t=${path%/*}/.ocr-$7-$$
    [ -z "$staged" ] || [ -e "$staged" ] || say again
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
    [ "${got%% *}" = "$sum" ] || say again
    [ -z "$owner" ] || error=$(chown "$owner:" "$t" 2>&1) || say fail "$error"
    error=$(chmod "$bits" "$t" 2>&1) || say fail "$error"
    error=$(mv -f "$t" "$path" 2>&1) || say fail "$error"
    say ok
    ;;
get)
    [ ! -d "$1" ] || say folder
    [ -e "$1" ] || say missing
    [ -f "$1" ] || say special
    error=$( (true <"$1") 2>&1) || say fail "$error"
    # Opened once, and counted through that: another file may take its name any time.
    exec 3<"$1"
    size=$( (wc -c </proc/self/fd/3) 2>&1) || say fail "$size"
    [ "$size" -le "$2" ] || say over "$size"
    [ "$size" -le "$3" ] || say large
    printf 'ocr1 file %s\n' "$size"
    [ "$size" = 0 ] || head -c "$size" <&3
    exit 0
    ;;
remove)
    [ -e "$1" ] || [ -L "$1" ] || say missing
    [ -L "$1" ] || [ ! -d "$1" ] || say folder
    error=$(rm -f "$1" 2>&1) || say fail "$error"
    say ok
    ;;
esac
