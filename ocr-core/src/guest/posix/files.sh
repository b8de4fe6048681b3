# The guest's half of moving files: a POSIX shell script, handed to `sh -c` behind common.sh.
#
#   /bin/sh -c SCRIPT ocr-file MODE BASE ARGUMENT...
#
# It needs sh, cat, chmod, chown, dd, find, head, id, mkdir, mv, rm, sha256sum, sleep, sync and wc, as coreutils and
# busybox have them, and /proc; with gzip, less has to be sent. It answers as runner.sh does.
#
# Work on files is done by one after the other, in the order in which it began. BASE/act/ID.* is one: `run` says who
# does it, under which token, and since when; `all` is what was sent; `head` says where its temporary files are, so that
# they are found again if it is killed.

export LC_ALL=C
mode=$1 base=$2
shift 2
whoami

# Removes what work $1, a path in act/ without its end, has left. The subshell ends at text that was cut.
sweep() {
    n=${1##*/}
    [ ! -s "$1.head" ] || (
        k=0
        g() {
            k=$((k + 1))
            rm -rf "$1/.ocr-$n-$k"
        }
        . "$1.head"
    )
    rm -f "$1".*
}

leave() {
    cd /
    sweep "$a"
    [ -z "$staged" ] || rm -f "$staged"
}

# Whether other work is to be waited for: what began earlier, or under an older token. What was killed is cleared away.
others() {
    found=1
    for r in "$base"/act/*.run; do
        [ "$r" != "$a.run" ] && [ -s "$r" ] || continue
        if ! works "$r"; then
            sweep "${r%.run}"
        elif [ "${rest:-0}" -lt "$since" ]; then
            found=0
        elif [ "$rest" = "$since" ] && [ "$pid" -lt $$ ]; then
            found=0
        fi
    done
    [ $found = 0 ] || older
}

# Begins work: under token $2, and waits for others for no longer than $3 hundredths of a second. Its name $1 is sent
# again when an answer is lost, and the first may still work then.
enter() {
    a=$base/act/$1.$$ token=$2
    [ "$token" = - ] || raise || say fenced
    clock
    since=$now given_up=$((now + $3))
    echo "$me $boot $token $since" >"$a.run" ||
        { mkdir -p "$base/act" && echo "$me $boot $token $since" >"$a.run"; } || say fail "cannot write in $base"
    trap leave EXIT
    trap 'exit 1' HUP INT PIPE TERM
    while { [ "$token" = - ] || { newest && [ "$newest" -le "$token" ]; } || say fenced; } && others; do
        clock
        [ "$now" -lt "$given_up" ] || say busy
        sleep 0.1 || sleep 1
    done
}

# In what was sent, each group of files is a call of `g FOLDER PARENTS MODE OWNER ./NAME...`, and $sizes has the sizes
# of all. $i counts the files, $k the groups: the answer names a file by its number.

# Nothing is changed as long as this may refuse.
check() {
    dir=$1
    [ -z "$4" ] || id -u "$4" >/dev/null 2>&1 || say noowner "$i"
    [ "$2" = 1 ] || [ -d "$dir/" ] || say noparent "$i"
    shift 4
    for name; do
        [ ! -d "$dir/$name" ] || say folder "$i"
        i=$((i + 1))
    done
}

# Goes to folder $1, then to temporary folder $2 in it: that very one, whoever else may write in the first.
inside() {
    cd -P "$1/" && here=${PWD%/} && cd -P "./$2" && [ "$PWD" = "$here/$2" ]
}

# Writes the next $1 bytes of what was sent to file $2.
copy() {
    true >"$2" || return
    # The last is all that is left, and cat is quicker than dd.
    [ "$sizes" != "$1 " ] || {
        cat <&5 >>"$2"
        return
    }
    [ "$1" -lt 1048576 ] || dd bs=1048576 count=$(($1 / 1048576)) <&5 >>"$2" || return
    [ $(($1 % 1048576)) = 0 ] || dd bs=$(($1 % 1048576)) count=1 <&5 >>"$2"
}

stage() {
    dir=$1 bits=$3 owner=$4 first=$i
    shift 4
    k=$((k + 1)) t=.ocr-$n-$k
    [ -d "$dir/" ] || error=$( (umask 022 && mkdir -p "$dir") 2>&1) || say failed "$i" "$error"
    error=$(mkdir "$dir/$t" 2>&1) || say failed "$i" "$error"
    inside "$dir" "$t" || say failed "$i" "the folder was moved away"
    for name; do
        error=$(copy "${sizes%% *}" "$name" 2>&1) || say failed "$i" "$error"
        sizes=${sizes#* } i=$((i + 1))
    done
    [ -z "$owner" ] || error=$(chown "$owner:" "$@" 2>&1) || say failed "$first" "$error"
    error=$(chmod "$bits" "$@" 2>&1) || say failed "$first" "$error"
}

move() {
    dir=$1
    shift 4
    k=$((k + 1))
    inside "$dir" ".ocr-$n-$k" || say failed "$i" "the folder was moved away"
    error=$(mv -f "$@" .. 2>&1) || say failed "$i" "$error"
    i=$((i + $#))
}

# Whether $1 and others of its kind are as they would be made: mode, owner, paths.
same() {
    bits=$1 owner=${2:-$uid}
    shift 2
    [ -z "$(find "$@" -prune \( ! -type f -o ! -perm "$bits" -o ! -user "$owner" \) -print 2>&1)" ] || differ
}

# Makes ready for what is to be sent.
differ() {
    error=$(mkdir -p "$base/in" 2>&1) || say fail "$error"
    # What a host that died has left.
    find "$base/in" "$base/act" -type f ! -name '*.run' -mtime +0 -exec rm -f {} +
    command -v gzip >/dev/null && say differ gzip
    say differ
}

exec 2>/dev/null
staged=
case $mode in
stage)
    differ
    ;;
check)
    enter "$1" "$2" "$3"
    cat >"$a.all" || say fail "cannot write in $base"
    [ "$(wc -c <"$a.all")" = "$5" ] || say again
    exec 5<"$a.all"
    text=$(dd bs="$4" count=1 <&5)
    uid=$(id -u)
    eval "$text"
    sha256sum -c <&5 >/dev/null || differ
    say same
    ;;
put)
    staged=$4 sum=$5 packed=$7
    [ -z "$staged" ] || [ -e "$staged" ] || say again
    [ "$packed" = 0 ] || command -v gzip >/dev/null || {
        [ -z "$staged" ] || rm -f "$staged"
        say nogzip
    }
    enter "$1" "$2" "$3"
    n=${a##*/} all=${staged:-$a.all}
    if [ "$packed" = 1 ]; then
        all=$a.all
        if [ "$staged" ]; then exec <"$staged"; fi
        error=$( (gzip -dc >"$all") 2>&1) || say again "$error"
    elif [ -z "$staged" ]; then
        error=$( (cat >"$all") 2>&1) || say again "$error"
    fi
    got=$(sha256sum <"$all")
    [ "${got%% *}" = "$sum" ] || say again
    exec 5<"$all"
    text=$(dd bs="$6" count=1 <&5)
    i=0
    g() { check "$@"; }
    eval "$text"
    printf '%s\n' "$text" >"$a.head" || say fail "cannot write in $base"
    i=0 k=0
    g() { stage "$@"; }
    eval "$text"
    i=0 k=0
    g() { move "$@"; }
    eval "$text"
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
    enter "$1" "$2" "$3"
    text=$(cat)
    case $text in *'#ocr') ;; *) say again ;; esac
    out='' error=''
    # A letter for each: k was there, f is a folder, m is missing, x could not be removed.
    g() {
        for p; do
            shift
            if [ -L "$p" ] || { [ -e "$p" ] && [ ! -d "$p" ]; }; then
                set -- "$@" "$p"
                out=${out}k
            elif [ -e "$p" ]; then
                out=${out}f
            else
                out=${out}m
            fi
        done
        [ $# = 0 ] || error=$error$(rm -f "$@" 2>&1)
    }
    eval "$text"
    if [ "$error" ]; then
        before=$out out=
        g() {
            for p; do
                c=${before%"${before#?}"} before=${before#?}
                [ "$c" != k ] || { [ ! -e "$p" ] && [ ! -L "$p" ]; } || c=x
                out=$out$c
            done
        }
        eval "$text"
    fi
    say removed "$out" "$error"
    ;;
esac
