"""Attribution beside plain passes forward and back over the same batches, in turn and several times.

    python benchmarks/attribute.py --out attribute.json [--pairs lab smollm2] [--rounds 5] [--points 8] [--device cpu]
        [--what time memory]

`plain` is what cannot be saved: two passes forward, and one forward and back for every point, with all gradients
dropped after each batch. Peak memory is that of a process of its own, from its start, on four times as many items;
`model` is a process that only loads the target and reads its weights. What is not measured again stays in the file.
"""

import json, time
from pathlib import Path
import torch
from act.attribute import answer_nats, attribute
from act.encoding import batches, encode
from act.kit.records import provenance, write_json
from act.loading import load_model
from act.sources import load_ability
from localize import PAIRS, added, arguments, peak
from transfer import summary


ITEMS = dict(lab=400, smollm2=6)  # of each pair; gradients of the larger one take a while without a GPU


def load(pair, dtype, device, batch_tokens, times=1):
    "(target, its tokenizer, the ability, its batches)"
    target, _, name, _ = PAIRS[pair]
    model, tok = load_model(target, dtype, device)
    items = load_ability(name, 'localize', times * ITEMS[pair])
    return model, tok, items, list(batches(encode(items, tok, 'predict'), tok, batch_tokens, padding_side='left'))


def plain(model, work, points, free=False):
    "The passes alone; with `free`, each gradient is dropped as soon as it is there."
    model.requires_grad_(True)
    hooks = []
    if free:
        drop = lambda p: setattr(p, 'grad', None)
        hooks = [p.register_post_accumulate_grad_hook(drop) for p in model.parameters()]
    for i in range(2 + points):
        for batch in work:
            with torch.set_grad_enabled(i > 1):
                nats = answer_nats(model, batch)
            if i > 1:
                nats.backward()
                model.zero_grad()
    for hook in hooks:
        hook.remove()
    if model.device.type == 'cuda':
        torch.cuda.synchronize()


def one_run(pair, run, points, dtype, device, batch_tokens):
    "A run in a process of its own."
    if run.startswith('attribute'):
        target, donor, name, _ = PAIRS[pair]
        items = load_ability(name, 'localize', 4 * ITEMS[pair])
        options = dict(points=points, dtype=dtype, device=device, batch_tokens=batch_tokens, progress=False)
        attribute(
            target, donor, items, hold='both' if 'held' in run else 'one', recompute='recompute' in run, **options
        )
        return
    model, _, _, work = load(pair, dtype, device, batch_tokens, 4)
    if run == 'model':
        sum(p.float().sum() for p in model.parameters())
    else:
        plain(model, work, points, free='free' in run)


RUNS = 'model', 'plain', 'plain, gradients freed', 'attribute', 'attribute, changes held', 'attribute, recompute'


def timed(pairs, rounds, points, dtype, device, batch_tokens):
    "Facts, ratios and single times of every pair."
    rows, facts, ratios = [], {}, {}
    for pair in pairs:
        model, tok, items, work = load(pair, dtype, device, batch_tokens)
        donor, _ = load_model(PAIRS[pair][1], dtype, device)
        facts[pair] = dict(
            target=PAIRS[pair][0],
            donor=PAIRS[pair][1],
            ability=items.name,
            items=len(items),
            parameters=model.num_parameters(),
            batches=len(work),
            tokens=sum(int(b['attention_mask'].sum()) for b in work),
            answer_tokens=sum(int(b['positions'].sum()) for b in work),
        )
        options = dict(points=points, batch_tokens=batch_tokens, progress=False, check=False)
        jobs = dict(
            plain=lambda: plain(model, work, points), attribute=lambda: attribute(model, donor, items, tok, **options)
        )
        for f in jobs.values():
            f()  # once to warm up
        for r in range(rounds):
            for name, f in jobs.items():
                start = time.perf_counter()
                f()
                rows.append(dict(pair=pair, round=r, run=name, seconds=round(time.perf_counter() - start, 3)))
                print(rows[-1], flush=True)
        at = lambda name: [r['seconds'] for r in rows if (r['pair'], r['run']) == (pair, name)]
        ratios[pair] = summary([x / y for x, y in zip(at('attribute'), at('plain'))])
    return dict(facts=facts, ratios=ratios, rows=rows)


def main(out, pairs, rounds, points, dtype, device, batch_tokens, what, one):
    settings = dict(points=points, dtype=dtype, device=device, batch_tokens=batch_tokens)
    if one:
        print(json.dumps(added(lambda: one_run(*one, **settings), device)))
        return
    found = json.loads(Path(out).read_text()) if Path(out).exists() else {}
    if 'time' in what:
        made = timed(pairs, rounds, **settings)
        found.update(
            provenance(
                format='act-bench-attribute-1', threads=torch.get_num_threads(), rounds=rounds, **settings, **made
            )
        )
    if 'memory' in what:
        words = [w for k, v in settings.items() for w in (f'--{k}', str(v))]
        found['memory'] = provenance(
            **{pair: {run: round(peak(__file__, pair, run, words)) for run in RUNS} for pair in pairs}
        )
    write_json(found, out)
    print(json.dumps({k: found[k] for k in ('facts', 'ratios', 'memory') if k in found}, indent=1))


if __name__ == '__main__':
    p = arguments(__doc__, 'float32')
    p.add_argument('--points', type=int, default=8)
    main(**vars(p.parse_args()))
