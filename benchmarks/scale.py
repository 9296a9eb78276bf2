"""Constants of this machine for `act_plan`, and predictions held against the clock, each taken while nothing else ran.

    python benchmarks/scale.py --folder /somewhere/with/10/GB --out act/results/scale.json

What `act_plan --measure` does, and then transfers and localisations of two known shapes filled with noise, predicted
and timed. Every single measurement waits for a quiet moment and is repeated when other processes took more than a tenth
of the processors meanwhile (Linux).
"""

import argparse, os, resource, tempfile, time
from pathlib import Path
from act.kit.records import write_json
from act.loading import channels_of, load_tokenizer
from act.masks import random_mask
from act.tools import machine
from act.tools.plan import even_mask, plan_localize, plan_transfer
from act.tools.shapes import sparse_checkpoint


def trial(
    constants: dict,  # of `measure_constants`
    folder,  # where there is room for three checkpoints
    source='qwen2.5-0.5b',  # as in `config_of`
    runs: int = 3,  # of each measurement
    items: int = 10,  # to localise with
) -> list:  # of dict(model, what, predicted_s, measured_s, ratio, predicted_peak, measured_peak)
    "Predict, run, compare; nothing is left in the folder."
    rows, label = [], source if isinstance(source, str) else 'own'

    def compare(what, predicted, peak, out, *call):
        got = machine.timed_cold(pair, out, *call)
        seconds = dict(predicted_s=predicted, measured_s=got['seconds'], ratio=predicted / got['seconds'])
        rows.append(dict(model=label, what=what, **seconds, predicted_peak=int(peak), measured_peak=got['peak']))

    with tempfile.TemporaryDirectory(dir=folder, prefix='act-scale-') as d:
        pair, out = [sparse_checkpoint(source, Path(d) / f'{i}', seed=i) for i in range(2)], Path(d) / 'out'
        mask = random_mask(even_mask(channels_of(pair[0]), 0.05)).save(Path(d) / 'mask.safetensors')
        moved = plan_transfer(*pair, mask, 0.5)
        read = plan_localize(pair[0], **machine.items_of_200(load_tokenizer(pair[0]), items)[1])
        peak = moved.peak + constants['overhead']['median']
        for _ in range(runs):
            call = 'streaming', 'transfer_checkpoint', *pair, mask, 0.5, out
            compare('transfer', moved.seconds(constants), peak, out, *call)
        for hold, peak in (('both', read.side_by_side), ('one', read.one_at_a_time)) * runs:
            call = 'tools.machine', 'localize_items', *pair, items, hold
            compare(f'localise, {hold}', read.seconds(constants, hold=hold), peak, out, *call)
    return rows


def busy():
    "Seconds since the machine started, over all processors: worked (stolen time included), and passed."
    t = [int(v) / os.sysconf('SC_CLK_TCK') for v in open('/proc/stat').readline().split()[1:9]]
    return sum(t) - t[3] - t[4], sum(t)


def own():
    "Seconds that this process and its children have worked."
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in used)


def others(f):
    "(f(), share of the processors that other processes took meanwhile)"
    (worked, passed), mine = busy(), own()
    value = f()
    (worked_then, passed_then), mine_then = busy(), own()
    return value, (worked_then - worked - (mine_then - mine)) / max(0.01, passed_then - passed)


def quiet(f, limit=0.1):
    "`f`, waiting for quiet before and repeated until it was quiet all along."

    def run(*args, **kwargs):
        while True:
            while others(lambda: time.sleep(2))[1] > limit:
                pass
            value, share = others(lambda: f(*args, **kwargs))
            print(f'{f.__name__}: others took {share:.0%}', flush=True)
            if share <= limit:
                return value

    return run


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--folder', required=True)
    p.add_argument('--out', required=True)
    a = p.parse_args()
    machine.rate_of, machine.timed_cold = quiet(machine.rate_of), quiet(machine.timed_cold)
    found = machine.measure_constants(a.folder)
    found['validation'] = [r for m in ('qwen2.5-0.5b', 'qwen2.5-1.5b') for r in trial(found, a.folder, m)]
    print(f'-> {write_json(found, a.out)}')
