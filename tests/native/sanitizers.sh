# What the scripts that run native tests under sanitizers begin with. Sets here, folder, generator and fixed_addresses.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[1]}")" && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

generator=()
if command -v ninja > /dev/null; then generator=(-G Ninja); fi

# ThreadSanitizer maps its shadow at fixed addresses, which the address randomisation of newer kernels may have taken.
# Some containers forbid to turn that off, and then it is tried as it is.
fixed_addresses=()
if setarch "$(uname -m)" -R true 2> /dev/null; then fixed_addresses=(setarch "$(uname -m)" -R); fi

export UBSAN_OPTIONS=print_stacktrace=1
export TSAN_OPTIONS=halt_on_error=1

# build FOLDER SANITIZERS TARGET... : further CMake options in the array `options`.
options=()
build() {
    cmake -S "$here" -B "$1" "${generator[@]}" -DFASTVQ_SANITIZE="$2" "${options[@]}" \
        -DPython_EXECUTABLE="$(command -v python || command -v python3)" &&
        cmake --build "$1" --target "${@:3}" --parallel "$(nproc)"
}

# Whether a program with these sanitizers can be made and run here. If not, says so for the check of that name, and ends
# the script if FASTVQ_REQUIRE_SANITIZERS=1.
available() {
    if echo 'int main() {}' > "$folder/empty.cpp" &&
        "${CXX:-c++}" -fsanitize="$2" "$folder/empty.cpp" -o "$folder/empty" 2> "$folder/reason" &&
        "${fixed_addresses[@]}" "$folder/empty" 2> "$folder/reason"; then
        return 0
    fi
    echo "WARNING: $1: NOT CHECKED, because no program runs with -fsanitize=$2 here:" >&2
    cat "$folder/reason" >&2
    if [[ ${FASTVQ_REQUIRE_SANITIZERS:-0} == 1 ]]; then exit 1; fi
    return 1
}
