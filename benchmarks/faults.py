"""Kill commands with SIGKILL at random moments, and run them again: is anything lost, left half-written, or different?

    python benchmarks/faults.py --kills 50 --seed 0 --out faults.json [--stages transfer,finetune]

Stages that the file holds from other runs stay in it.

Each kill has a folder of its own, and comes at a moment drawn uniformly from the run time of an undisturbed run, less
what `--help` takes (at most half of it). After it the output must be absent, or complete and equal to the undisturbed
one, with nothing beside it but hidden files of its name; after a second, undisturbed run of the same command it must be
complete, equal and alone. The bytes of all safetensors files are compared.
"""

import argparse, hashlib, json, os, random, subprocess, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import torch
from act.loading import channels_of, load_model
from act.kit.records import provenance, write_json
from act.deltas import make_delta
from act.masks import ChannelMask

BIN = Path(sys.executable).parent


def shards(here):
    "SmolLM2 and its mathematician in files of 40 MB, a mask of a twentieth of the channels, and their delta."
    for name, model in dict(base='smollm2', maths='smollm2/maths').items():
        net, tok = load_model(model)
        for part in (net, tok):
            part.save_pretrained(here / name, max_shard_size='40MB')
    cm = channels_of(here / 'base')
    ChannelMask.from_flat(torch.rand(cm.total, generator=torch.Generator().manual_seed(0)) < 0.05, cm).save(
        here / 'mask'
    )
    make_delta(here / 'maths', here / 'base', here / 'mask', 0.5, here / 'delta')


PAIR = '--target {here}/maths --donor {here}/base'
STAGES = dict(  # name -> (what makes its inputs in a folder {here}, the command to kill, which writes {out})
    transfer=(shards, f'act_transfer {PAIR} --mask {{here}}/mask --lam 0.5 --out {{out}}'),
    delta=(shards, f'act_delta {PAIR} --mask {{here}}/mask --lam 0.5 --out {{out}}'),
    apply=(shards, 'act_apply --target {here}/maths --delta {here}/delta --out {out}'),
    localize=(
        shards,
        f'act_localize {PAIR} --ability lab/science-en --n 120 --batch_tokens 256 --save_seconds 0 --out {{out}}',
    ),
    localize_in_turn=(
        shards,
        (
            f'act_localize {PAIR} --ability lab/science-en --n 120 --batch_tokens 256 --save_seconds 0 --hold one --out'
            ' {out}'
        ),
    ),
    finetune=(
        None,
        (
            'act_finetune --model lab/maths-en --ability lab/science-zh --validation lab/science-zh --steps 60 --lr'
            ' 1e-4 --save_steps 5 --out {out}'
        ),
    ),
)


def start(command):
    return subprocess.Popen(
        [str(BIN / command.split()[0]), *command.split()[1:]],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ, OMP_NUM_THREADS='1', TQDM_DISABLE='1'),
    )


def finish(command):
    p = start(command)
    return p.wait(), p.stderr.read()


def content(out):
    files = [out] if out.is_file() else sorted(out.rglob('*.safetensors'))
    return {str(f.relative_to(out.parent)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def whole(command, folder):
    "Seconds and content of an undisturbed run."
    out, begin = Path(folder) / 'out', time.time()
    rc, err = finish(command.format(here=Path(folder).parent, out=out))
    if rc:
        sys.exit(f'{command}: {err[-2000:]}')
    return time.time() - begin, content(out)


def kill(command, folder, want, after):
    "One kill after so many seconds, and what was found."
    out, found = Path(folder) / 'out', dict(after=round(after, 3), wrong=[])
    command = command.format(here=Path(folder).parent, out=out)
    p = start(command)
    try:
        p.wait(after)
    except subprocess.TimeoutExpired:
        p.kill()
    p.communicate()
    names, kept, done = os.listdir(folder), Path(folder) / '.out.partial', out.exists()
    found.update(
        moment='after' if done else 'within' if names else 'before',
        kept=any(f.is_file() and f.name != 'key' for f in kept.rglob('*')),
    )
    if any(n != 'out' and not n.startswith('.out.') for n in names):
        found['wrong'].append(f'stray names {names}')
    if done and content(out) != want:
        found['wrong'].append('output there, but not whole')
    begin = time.time()
    rc, err = finish(command)
    found['again'] = round(time.time() - begin, 3)
    if rc and not (done and 'exists already' in err):
        found['wrong'].append(f'second run failed: {err[-500:]}')
    if content(out) != want:
        found['wrong'].append('other bytes after the second run')
    if os.listdir(folder) != ['out']:
        found['wrong'].append(f'left behind: {os.listdir(folder)}')
    return found


def main(out, stages, kills, seed, jobs):
    result = json.loads(Path(out).read_text())['stages'] if Path(out).exists() else {}  # of other stages
    with tempfile.TemporaryDirectory() as here, ThreadPoolExecutor(jobs) as pool:
        place = lambda: tempfile.mkdtemp(dir=here)
        for name in stages.split(','):
            (make, command), rng = STAGES[name], random.Random(f'{name} {seed}')
            if make and not (Path(here) / 'delta').exists():
                make(Path(here))
            runs = list(pool.map(lambda _: whole(command, place()), range(jobs)))
            seconds, want, begin = max(s for s, _ in runs), runs[0][1], time.time()
            finish(f'{command.split()[0]} --help')
            begin = min(time.time() - begin, seconds / 2)
            if any(c != want for _, c in runs):
                sys.exit(f'{name}: two undisturbed runs differ')
            rows = []
            for row in pool.map(
                lambda t: kill(command, place(), want, t), [rng.uniform(begin, seconds) for _ in range(kills)]
            ):
                rows.append(row)
                print(name, len(rows), row, flush=True)
            result[name] = provenance(
                command=command,
                seed=seed,
                start=round(begin, 2),
                seconds=round(seconds, 2),
                kills=kills,
                **{m: sum(r['moment'] == m for r in rows) for m in ('before', 'within', 'after')},
                kept=sum(r['kept'] for r in rows),
                wrong=sum(bool(r['wrong']) for r in rows),
                rows=rows,
            )
            write_json(dict(format='act-faults-1', stages=result), out)
            print({k: v for k, v in result[name].items() if k != 'rows'}, flush=True)
    sys.exit(any(result[n]['wrong'] for n in stages.split(',')))


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', required=True)
    p.add_argument('--stages', default=','.join(STAGES))
    p.add_argument('--kills', type=int, default=50)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--jobs', type=int, default=2)
    main(**vars(p.parse_args()))
