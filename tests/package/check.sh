#!/usr/bin/env bash
# Build wheel and sdist, check them, and use the wheel in an empty environment: check.sh PYTHON [OTHER ...]
# The first interpreter has build and twine; each OTHER gets an empty environment as well.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
folder=$PWD/build/package
rm -rf "$folder"
mkdir -p "$folder"
"$python" -m build --outdir "$folder" . > "$folder/build.log" 2>&1 || { tail -30 "$folder/build.log"; exit 1; }
"$python" -m twine check --strict "$folder"/*.whl "$folder"/*.tar.gz
listed=$(tar -tzf "$folder"/*.tar.gz)
for file in CITATION.cff CHANGELOG.md docs/index.md docs/conf.py tests/conftest.py notebooks/run.py Makefile; do
    grep -q "/$file\$" <<< "$listed" || { echo "the sdist lacks $file"; exit 1; }
done
wheel=$(echo "$folder"/*.whl)
for interpreter in "$@"; do
    place=$folder/$("$interpreter" -c 'import sys; print("venv%d%d" % sys.version_info[:2])')
    "$interpreter" -m venv "$place"
    "$place/bin/python" -m pip install -qq --disable-pip-version-check "$wheel[plots]"
    "$place/bin/python" -m pip check
    cd "$place"
    bin/numpyro-maf --version
    bin/numpyro-maf demo --quick --only density --out pictures | grep -- '-> '
    test -s pictures/density.png
    bin/python - <<'END'
import numpyro_maf as nm
nm.save("flow.safetensors", nm.maf(0, 2))
END
    bin/numpyro-maf info flow.safetensors --check | head -2
    env -u PYTHONDONTWRITEBYTECODE bin/python "$OLDPWD/tests/package/imports.py"
    cd "$OLDPWD"
done
