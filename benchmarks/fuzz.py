"""Broken and hostile files of every kind, given to their parsers.

Each must be accepted as something sound or refused with the library's own error.

    python benchmarks/fuzz.py --files 64000 --seed 0 --out act/results/fuzz.json

File number i of a kind depends on the seed, the kind and i alone. The kinds and the changes are in tests/mutate.py.
"""

import argparse, resource, sys, tempfile, time
from collections import Counter
from pathlib import Path
from act.kit.records import provenance, write_json

sys.path.insert(0, str(Path(__file__).parent.parent / 'tests'))
from mutate import KINDS, attempt, mutant, prepared


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def fuzz(name, n, seed, folder, keep=None):
    "One row of counts; crashes are listed, and their files kept when `keep` names a folder."
    kind, sound, folder = prepared(name, folder)
    counts, crashes, start, before = Counter(), [], time.time(), peak()
    for i in range(n):
        change, raw = mutant(name, kind, sound, seed, i)
        try:
            counts[change, attempt(kind, raw, folder)] += 1
        except KeyboardInterrupt:
            raise
        except BaseException as e:  # whatever it is, a library must not raise it for a file
            crashes.append(dict(file=i, change=change, error=f'{type(e).__name__}: {e}'[:300]))
            if keep:
                (Path(keep) / f'{name}-{i}').write_bytes(raw)
    total = lambda out: sum(c for (_, o), c in counts.items() if o == out)
    return dict(
        kind=name,
        files=n,
        accepted=total('accepted'),
        refused=total('refused'),
        crashes=crashes,
        seconds=round(time.time() - start, 1),
        grown_mb=round(peak() - before),
        changes={c: {o: counts[c, o] for o in ('accepted', 'refused')} for c in kind.changes},
    )


def main(files, seed, out, keep):
    if keep:
        Path(keep).mkdir(parents=True, exist_ok=True)
    rows, start = [], time.time()
    with tempfile.TemporaryDirectory(dir='/dev/shm' if Path('/dev/shm').is_dir() else None) as d:
        for j, name in enumerate(KINDS):
            rows.append(fuzz(name, files // len(KINDS) + (j < files % len(KINDS)), seed, d, keep))
            r = rows[-1]
            print(
                f"{name:8} {r['files']:6} files, {r['accepted']:6} accepted, {r['refused']:6} refused,"
                f" {len(r['crashes'])} crashes, {r['seconds']} s, {r['grown_mb']} MB more",
                flush=True,
            )
            for c in r['crashes'][:10]:
                print('   ', c, flush=True)
    total = {k: sum(r[k] for r in rows) for k in ('files', 'accepted', 'refused')} | dict(
        crashes=sum(len(r['crashes']) for r in rows)
    )
    if out:
        write_json(
            provenance(format='act-fuzz-1', seed=seed, **total, seconds=round(time.time() - start), kinds=rows), out
        )
    print(total)
    return bool(total['crashes'])


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--files', type=int, default=64000)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--out')
    p.add_argument('--keep', help='folder for the files that crash a parser')
    sys.exit(main(**vars(p.parse_args())))
