#!/usr/bin/env bash
# A user's program in the strictest modes of mypy and pyright, against the built wheel: check.sh PYTHON
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$1
folder=build/types
rm -rf "$folder"
"$python" -m pip wheel -q --no-deps -w "$folder" . 2>/dev/null
"$python" -m venv --without-pip "$folder/venv"
site=$("$folder/venv/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
"$python" -m pip install -q --no-deps --target "$site" "$folder"/*.whl
# Its dependencies are those of the interpreter given, whose own copy of the package comes after the wheel's.
"$python" -c "import sysconfig; print(sysconfig.get_path('purelib'))" > "$site/dependencies.pth"
bin=$(cd "$(dirname "$python")" && pwd)
cp tests/typing/user.py "$folder"
cd "$folder"
# NumPyro and optax ship no types, which every user of them tells mypy.
"$bin/mypy" --strict --ignore-missing-imports --no-incremental --python-executable venv/bin/python --config-file "" user.py
cat > pyrightconfig.json <<END
{"include": ["user.py"], "typeCheckingMode": "strict", "venvPath": ".", "venv": "venv",
 "reportMissingTypeStubs": false}
END
"$bin/basedpyright"
