# Removes a file. Wants: PATH. Prints `ocr1 done`, or what is in the way.
if [ -L "$1" ] || { [ -e "$1" ] && [ ! -d "$1" ]; }; then
    if rm -f "$1"; then echo 'ocr1 done'; else echo 'ocr1 refused'; fi
elif [ -d "$1" ]; then
    echo 'ocr1 folder'
else
    echo 'ocr1 missing'
fi
