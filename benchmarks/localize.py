"""Localisation beside two plain forward passes of the same batches, in turn and several times.

    python benchmarks/localize.py --out localize.json [--pairs lab smollm2] [--rounds 5] [--device cpu]
        [--what time memory]

`plain` calls the two models on every batch; `without head` leaves out the last matrix product, as localisation does
when the head is tied or not scored. Peak memory is what a run adds to a process of its own that holds both models and
has used them once, on four times as many items. What is not measured again stays in the file.
"""

import argparse, json, re, subprocess, sys, time
from pathlib import Path
import torch
from act.encoding import batches, encode
from act.sources import load_ability
from act.channels import enumerate_channels
from act.loading import load_model
from act.kit.records import provenance, write_json
from act.localize import localize
from transfer import summary

PAIRS = dict(
    lab=('lab/maths-en', 'lab/base', 'lab/science-zh', 400), smollm2=('smollm2/maths', 'smollm2', 'gsm8k/en', 24)
)


def plain(models, work, whole):
    "Two plain forward passes of every batch."
    with torch.no_grad():
        for batch in work:
            for m in models:
                (m if whole else m.base_model)(
                    **{k: batch[k].to(m.device) for k in ('input_ids', 'attention_mask', 'position_ids')},
                    use_cache=False,
                )
    if models[0].device.type == 'cuda':
        torch.cuda.synchronize()


def load(pair, dtype, device, batch_tokens, times=1):
    "(models, tokenizer, ability, its batches)"
    target, donor, name, n = PAIRS[pair]
    (a, tok), (b, _) = (load_model(m, dtype, device) for m in (target, donor))
    items = load_ability(name, 'localize', times * n)
    return (a, b), tok, items, list(batches(encode(items, tok), tok, batch_tokens))


def runs(models, tok, items, work, batch_tokens):
    "What is measured: name -> function."
    return {
        'plain': lambda: plain(models, work, True),
        'without head': lambda: plain(models, work, False),
        'localize': lambda: localize(*models, items, tok, batch_tokens=batch_tokens, progress=False),
    }


def peak(script, pair, name, args):
    "MB that one run of a script adds at its peak, in a process of its own."
    done = subprocess.run([sys.executable, script, '--one', pair, name, *args], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def status(field):
    return int(re.search(rf'{field}:\s+(\d+) kB', Path('/proc/self/status').read_text())[1]) / 1e3  # MB of this process


def added(f, device):
    "MB that `f` adds at its peak."
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    Path('/proc/self/clear_refs').write_text('5')  # the peak starts anew
    before = status('VmRSS')
    f()
    return status('VmHWM') - before


def timed(pairs, rounds, dtype, device, batch_tokens):
    "Facts, ratios and single times of every pair."
    rows, facts = [], {}
    for pair in pairs:
        models, tok, items, work = load(pair, dtype, device, batch_tokens)
        tokens = sum(int(b['attention_mask'].sum()) for b in work)
        facts[pair] = dict(
            target=PAIRS[pair][0],
            donor=PAIRS[pair][1],
            ability=items.name,
            items=len(items),
            parameters=models[0].num_parameters(),
            channels=enumerate_channels(models[0]).total,
            batches=len(work),
            tokens=tokens,
            answer_tokens=sum(int(b['positions'].sum()) for b in work),
            padding=round(1 - tokens / sum(b['input_ids'].numel() for b in work), 4),
        )
        jobs = runs(models, tok, items, work, batch_tokens)
        for f in jobs.values():
            f()  # once to warm up
        for r in range(rounds):
            for name, f in jobs.items():
                start = time.perf_counter()
                f()
                rows.append(dict(pair=pair, round=r, run=name, seconds=round(time.perf_counter() - start, 3)))
                print(rows[-1], flush=True)
    at = lambda pair, name: [r['seconds'] for r in rows if (r['pair'], r['run']) == (pair, name)]
    ratios = {
        pair: {
            f'to {n}': summary([x / y for x, y in zip(at(pair, 'localize'), at(pair, n))])
            for n in ('plain', 'without head')
        }
        for pair in pairs
    }
    return dict(facts=facts, ratios=ratios, rows=rows)


def main(out, pairs, rounds, dtype, device, batch_tokens, what, one):
    if one:
        models, tok, items, work = load(one[0], dtype, device, batch_tokens, 4)
        plain(models, list(batches(encode(items[:1], tok), tok)), True)  # weights are in memory once they were used
        print(json.dumps(added(runs(models, tok, items, work, batch_tokens)[one[1]], device)))
        return
    found = json.loads(Path(out).read_text()) if Path(out).exists() else {}
    if 'time' in what:
        found.update(
            provenance(
                format='act-bench-localize-1',
                dtype=dtype,
                device=device,
                threads=torch.get_num_threads(),
                batch_tokens=batch_tokens,
                **timed(pairs, rounds, dtype, device, batch_tokens),
            )
        )
    if 'memory' in what:
        mb = lambda pair, name, budget: round(
            peak(__file__, pair, name, ['--dtype', dtype, '--device', device, '--batch_tokens', str(budget)])
        )
        found['memory'] = provenance(
            **{
                pair: {
                    **{name: mb(pair, name, batch_tokens) for name in ('plain', 'without head')},
                    'localize': {n: mb(pair, 'localize', n) for n in (512, 1024, 2048, 4096)},
                }
                for pair in pairs
            }
        )
    write_json(found, out)
    print(json.dumps({k: found[k] for k in ('facts', 'ratios', 'memory') if k in found}, indent=1))


def arguments(doc, dtype):
    "What a benchmark with pairs, rounds and single runs is called with."
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out')
    p.add_argument('--pairs', nargs='+', default=list(PAIRS))
    p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--dtype', default=dtype)
    p.add_argument('--device', default='cpu')
    p.add_argument('--batch_tokens', type=int, default=4096)
    p.add_argument('--what', nargs='+', default=['time', 'memory'], choices=['time', 'memory'])
    p.add_argument('--one', nargs=2, metavar=('PAIR', 'RUN'), help='one run, for its peak memory')
    return p


if __name__ == '__main__':
    main(**vars(arguments(__doc__, 'bfloat16').parse_args()))
