"""Damaged and hostile files: each must load bit-equal or be refused with ValueError, soon and without memory.

    python benchmarks/faults/files.py --count 100000

Half of the files have bytes changed anywhere: one bit, some bytes, a piece cut out or doubled, the end lost.
The other half are written by somebody who knows the format: values in the header's structure are replaced and
the digest is right. Half of those start from files of version 1, which have no digest.
"""

import argparse
import collections
import copy
import hashlib
import json
import pathlib
import resource
import struct
import tempfile
import time

import jax
import numpy as np
import tqdm
from safetensors.numpy import load, save

import numpyro_maf as nm

VERSION_1 = pathlib.Path(__file__).parents[2] / "tests" / "files" / "v1"
ODD = [None, True, -1, 0, 3, 10**6, 10**12, 1e308, "nan", "", "Affine", [], {}, [[]], {"class": "MaskedMLP"}]


def leaves(value, path=()):
    """Paths of everything in a structure."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield (*path, key)
        yield from leaves(part, (*path, key))


def damaged(rng, data):
    """Bytes changed anywhere."""
    data, at = bytearray(data), rng.integers(len(data))
    kind, size = rng.integers(5), int(rng.integers(1, 64))
    if kind == 0:
        data[at] ^= 1 << rng.integers(8)
    elif kind == 1:
        data[at : at + size] = rng.bytes(size)
    elif kind == 2:
        del data[at : at + size]
    elif kind == 3:
        data[at:at] = data[at : at + size]
    else:
        del data[at:]
    return bytes(data)


def forged(rng, data):
    """One or two values of the structure replaced, the digest right."""
    size = struct.unpack("<Q", data[:8])[0]
    metadata = json.loads(data[8 : 8 + size])["__metadata__"]
    header, arrays = json.loads(metadata["numpyro_maf"]), load(data)
    for _ in range(rng.integers(1, 3)):
        paths = list(leaves(header))
        *path, last = paths[rng.integers(len(paths))]
        place = header
        for key in path:
            place = place[key]
        place[last] = copy.deepcopy(ODD[rng.integers(len(ODD))])
    text = json.dumps(header)
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        digest.update(
            f"{name} {arrays[name].dtype.str} {arrays[name].shape}".encode() + arrays[name].tobytes()
        )
    about = {"numpyro_maf": text}
    return save(arrays, about | ({"sha256": digest.hexdigest()} if "sha256" in metadata else {}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, counts, slowest = np.random.default_rng(options.seed), collections.Counter(), 0.0
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "file"
        old = [p for p in sorted(VERSION_1.glob("*.safetensors")) if p.stat().st_size < 20_000]
        new = []
        for source in old:
            nm.save(path, nm.load(source))
            new.append(path.read_bytes())
        sources = {"version 1": [p.read_bytes() for p in old], "version 2": new}
        whole = {data: [np.asarray(a) for a in jax.tree.leaves(nm.load(p))] for data, p in zip(new, old)}
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for i in tqdm.trange(options.count):
            how = "damaged" if i % 2 else "forged"
            version = "version 2" if i % 2 or i % 4 else "version 1"
            source = sources[version][rng.integers(len(old))]
            data = (damaged if i % 2 else forged)(rng, source)
            path.write_bytes(data)
            began = time.perf_counter()
            try:
                learned = nm.load(path)
                what = "loaded"
                if how == "damaged":
                    found = [np.asarray(a) for a in jax.tree.leaves(learned)]
                    same = len(found) == len(whole[source]) and all(map(np.array_equal, found, whole[source]))
                    what = "loaded, bit-equal" if same else "loaded, WRONG"
            except ValueError:
                what = "ValueError"
            except Exception as error:
                what = f"UNDOCUMENTED {type(error).__name__}"
            slowest = max(slowest, time.perf_counter() - began)
            counts[how, version, what] += 1
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for (how, version, what), count in sorted(counts.items()):
        print(f"{how:8} {version}  {what:20} {count:8,}")
    print(f"slowest {slowest:.1f} s; peak memory grew by {(after - before) / 1024:.0f} MB")


if __name__ == "__main__":
    main()
