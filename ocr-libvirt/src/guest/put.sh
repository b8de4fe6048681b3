# Puts a file in its place: a temporary one beside it first, then a rename.
#
# Wants: PHASE PATH TEMP MASK MODE OWNER PARENTS SUM
#   PHASE    whole: stdin is the content; begin: make TEMP, which is then written; end: check TEMP and rename it
#   MASK     umask of TEMP; MODE: its mode, empty when MASK says all; OWNER: may be empty
#   PARENTS  1 when missing folders shall be made; SUM: SHA-256 of the content
# Prints `ocr1 done`, or what is in the way.
phase=$1 path=$2 temp=$3 mask=$4 mode=$5 owner=$6 parents=$7 sum=$8
umask "$mask"
fail() {
    [ ! -e "$temp" ] || rm -f "$temp"
    echo "ocr1 $1"
    exit 0
}
[ ! -d "$path" ] || fail folder
if [ $phase != end ]; then
    [ -z "$owner" ] || id -u "$owner" >/dev/null 2>&1 || fail nouser
    folder=${path%/*}/
    if [ ! -d "$folder" ]; then
        [ "$parents" = 1 ] || fail noparent
        (umask 022 && mkdir -p "$folder") || fail mkdir
    fi
    # Left by somebody who was cut off.
    for old in "${temp%-*}"-*; do
        [ ! -e "$old" ] || rm -f "$old"
    done
fi
case $phase in
    begin)
        (umask 077 && echo >"$temp") || fail write
        echo 'ocr1 done'
        exit
        ;;
    whole) cat >"$temp" || fail write ;;
esac
set -- $(sha256sum <"$temp")
[ "$1" = "$sum" ] || fail digest
[ -z "$owner" ] || chown "$owner" "$temp" || fail chown
[ -z "$mode" ] || chmod "$mode" "$temp" || fail chmod
mv -f "$temp" "$path" || fail rename
echo 'ocr1 done'
