# Prints a file. Wants: PATH MOST. Prints `ocr1 file` and at most MOST bytes of it, or why not.
if [ -f "$1" ]; then
    [ -r "$1" ] || { echo 'ocr1 unreadable'; exit; }
    echo 'ocr1 file'
    head -c "$2" "$1"
elif [ -d "$1" ]; then
    echo 'ocr1 folder'
elif [ -e "$1" ]; then
    # A pipe or a device: reading may never end.
    echo 'ocr1 special'
else
    echo 'ocr1 missing'
fi
