"The paper against what was measured: every claim has a row, verdicts follow their rules."

import numpy as np, pandas as pd, pytest
from pathlib import Path
from act.studies.claims import finding_rows, merge_rows, paper_table, recovery_rows
from act.studies.families import FAMILIES
from act.studies.findings import JUDGEMENTS, STUDIES
from act.studies.merge import Merged
from act.studies.cases import MergeCase
from act.studies.cases import Case
from act.studies.recovery import Recovery

NOTEBOOKS = Path(__file__).resolve().parent.parent / 'nbs'
META = dict(machine=dict(cpu='c', gpu=None, cores=2), git='abc', data={'lab/x': 'h'})


def at(n):
    return (np.arange(200) < 2 * n).astype(float)


def recovery(target, plain, sft, act, kept=95, random=(90, 20)):
    row = lambda k, r: [dict(k=at(k), r=at(r))]
    rows = {
        'target': row(95, target),
        'donor': row(5, 100),
        'target + SFT': row(95, sft),
        'random mask + SFT': row(*random),
    }
    for a in ('ACT', 'ACT (module-normalised)'):
        rows |= {f'{a} without SFT': row(95, plain), a: row(kept, act)}
    return Recovery(Case('t', 'd', ('r',), ('k',), ()), rows, pd.DataFrame(), {}, META)


@pytest.mark.parametrize(
    'rec, verdicts',
    [
        (recovery(20, 40, 30, 60), ('holds', 'holds')),
        (recovery(20, 40, 60, 60), ('in part', 'holds')),  # fine-tuning alone does as much
        (recovery(20, 40, 30, 60, random=(95, 60)), ('in part', 'holds')),  # and so do random channels
        (recovery(20, 40, 30, 60, random=(95, 58)), ('in part', 'holds')),  # less than a twentieth of the gap
        (recovery(20, 20, 60, 20), ('does not hold', 'holds')),
        (recovery(20, 40, 30, 60, kept=60), ('holds', 'does not hold')),
        (recovery(20, 40, 30, 60, kept=94), ('holds', 'holds')),
    ],
)
def test_verdicts_of_recovering(rec, verdicts):
    rows = recovery_rows(dict(x=rec))
    assert tuple(r['verdict'] for r in rows[:2]) == verdicts == tuple(r['verdict'] for r in rows[2:])
    assert all(r['paper'] == 'not public' for r in rows)


def test_where_nothing_could_be_lost_there_is_no_verdict():
    rec = recovery(20, 40, 30, 60)
    rec.rows['WiSE-FT + SFT'] = [dict(k=at(95), r=at(90))]
    assert [r['verdict'] for r in recovery_rows(dict(x=rec))] == ['holds', ''] * 2
    assert 'nothing was at stake' in recovery_rows(dict(x=rec))[1]['measured']
    rec = recovery(20, 40, 30, 60)
    rec.rows['WiSE-FT + SFT'] = [dict(k=at(50), r=at(90))]
    assert [r['verdict'] for r in recovery_rows(dict(x=rec))] == ['holds', 'holds'] * 2


@pytest.mark.parametrize('act, verdict', [(90, 'holds'), (50, 'does not hold')])
def test_the_verdict_of_merging(act, verdict):
    row = lambda a, b, base: [dict(a=at(a), b=at(b), s=at(base))]
    rows = {
        'oracle': row(95, 95, 100),
        'base': row(0, 0, 100),
        'A': row(95, 0, 60),
        'B': row(0, 95, 60),
        'light SFT only': row(10, 10, 100),
        **{f'{a}{s}': row(act, act, 60) for a in ('ACT', 'ACT (module-normalised)') for s in ('', ' without SFT')},
    }
    grid = pd.DataFrame([dict(row=r, setting={}) for r in ('base', 'A', 'B')])
    case = MergeCase('lab/base', {'lab/A': ('lab/a',), 'lab/B': ('lab/b',)}, ('lab/s',))
    r = merge_rows(dict(x=Merged(case, rows, grid, {}, META)))
    assert [o['verdict'] for o in r] == [verdict] * 2
    assert 'best single model (A)' in r[0]['measured']
    assert r[0]['model'] == '2 specialists of lab/base'


@pytest.mark.slow
def test_every_claim_stands_in_the_table():
    t = paper_table()
    assert set(t.source) == {'first-hand', 'second-hand'}
    assert not t.drop(columns='verdict').isna().any().any()
    assert (t.measured.str.len() > 10).all()
    assert (t.revision.str.len() > 6).all()
    assert len(finding_rows()) == len(STUDIES) * len(FAMILIES)
    assert set(t[t.source == 'first-hand'].verdict) <= {*JUDGEMENTS, ''}
    assert set(t.kind) == {'claim', 'rule', 'use'}
    assert all((NOTEBOOKS / f'{page}.ipynb').is_file() for page in t.page)
    assert set(t.paper) == {
        '< 5 % of channels',
        'not public',
        *t[t.source == 'second-hand'].paper,
    }  # no other figure is called the paper's
