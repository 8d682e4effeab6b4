"""How long the package takes to import: at most 1.25 times as long as NumPyro. CPU time, the best of four."""

import resource
import subprocess
import sys

LIMIT, ROUNDS = 1.25, 4


def seconds(module):
    """CPU time of a process that imports a module."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


best = {"numpyro": float("inf"), "numpyro_maf": float("inf")}
for module in best:
    seconds(module)  # which writes the bytecode
for _ in range(ROUNDS):
    for module in best:
        best[module] = min(best[module], seconds(module))
ratio = best["numpyro_maf"] / best["numpyro"]
print(f"import: {best['numpyro_maf']:.2f} s, NumPyro's {best['numpyro']:.2f} s, ratio {ratio:.2f}")
if ratio > LIMIT:
    sys.exit(f"import takes {ratio:.2f} times as long as NumPyro's, more than {LIMIT}")
