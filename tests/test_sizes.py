"Equal sizes: as many channels for all, files that go on, intervals over trainings and items, rules with nulls."

import json
import numpy as np
import pytest
import torch
from act.channels import ChannelMap, ModuleChannels
from act.kit.errors import ActError
from act.scores import Attribution, ChannelScores
from act.studies.choices import CHOICES, exactly, models_of
from act.studies.equal_sizes import RULES, in_words
from act.studies.size_results import EqualSizes, draws, training_weights
from act.studies.doses import pack, unpack
from act.studies.sizes import SKILLS, Training, gather, measure_sizes, training_case, trainings_in

ABILITIES = dict(recovered=['lab/science-zh'], retained=['lab/multiplication-en'], others=['lab/science-en'])


def items(share, n=40):
    "Packed answers with that share of right ones, spread out."
    return pack([int((i + 1) * share + 1e-9) > int(i * share + 1e-9) for i in range(n)])


def case(training, recovered, retained=1.0, n=40):
    "A made-up case at 2 %: every row has its share of the recovered items right."
    shares = dict(target=(0.2, 1.0), donor=(1.0, 0.0)) | {
        row: (0.2, 1.0) for row in CHOICES if row not in ('target', 'donor')
    }
    shares |= {row: (share, retained) for row, share in recovered.items()}
    models = []
    for row, (back, kept) in shares.items():
        sizeless = CHOICES[row].sizes == (0,)
        found = {'science-zh': back, 'multiplication-en': kept, 'science-en': 0.5}
        test = {a: items(share, n) for a, share in found.items()}
        model = dict(row=row, p=0 if sizeless else 0.02, draw=0, tuned=False, seconds=0, test=test, validation=found)
        models.append(model)
    about = dict(recipe=training[0], training=training, skill='science', case=ABILITIES, counts=dict.fromkeys(found, n))
    return dict(**about, models=models, meta={})


def result(recovered, **options):
    return EqualSizes([case(t, recovered, **options) for t in ('a-1', 'a-2', 'b-1')], n=300)


def test_a_ranking_gives_exactly_as_many_channels_even_below_zero():
    parts = [ModuleChannels('lm_head', 'lm_head', None, 6, ()), ModuleChannels('model.norm', 'norm', None, 4, ())]
    channels = ChannelMap(parts, tied=None)
    signed = Attribution.from_flat(torch.tensor([3.0, -1, -2, -3, -4, -5, 2, 1, -6, -7]), channels)
    assert exactly(signed, 0.5).flat().nonzero()[:, 0].tolist() == [0, 1, 2, 6, 7]
    assert exactly(signed, 0.2, without=('lm_head',)).flat().nonzero()[:, 0].tolist() == [6, 7]
    assert exactly(signed, 1.0, without=('lm_head',)).count == 4
    scores = ChannelScores.from_flat(torch.tensor([10.0, 10, 10, 10, 10, 30, 1, 1, 1, 5]), channels)
    assert exactly(scores, 0.1).flat().nonzero()[:, 0].tolist() == [5]
    assert exactly(scores, 0.1, 'module').flat().nonzero()[:, 0].tolist() == [9]


def test_models_are_as_many_as_the_rows_have_sizes_and_draws():
    rows = 'target', 'random', 'learned gates', 'tuned on the items'
    found = models_of(rows, (0.01, 0.5), (0.01,))
    assert found == [
        ('target', 0, 0, False),
        ('target', 0, 0, True),
        *[('random', p, draw, False) for p in (0.01, 0.5) for draw in range(3)],
        ('random', 0.01, 0, True),
        ('learned gates', 0.01, 0, False),
        ('learned gates', 0.01, 0, True),
        ('tuned on the items', 0, 0, False),
    ]


def test_others_are_all_that_the_base_knows_but_what_is_brought_back():
    for skill, lang in zip(SKILLS, ('el', 'zh')):
        made = training_case('swahili', skill, 'somewhere')
        assert made.recovered == (f'lab/{skill}-{lang}',)
        assert len(made.others) == 11
        assert not set(made.recovered) & set(made.others)


def test_trainings_are_found_by_name(tmp_path):
    (tmp_path / 'maths-en-hard-3').mkdir()
    (found,) = trainings_in(tmp_path, ['maths-en'], [3], 'hard')
    assert found == Training('maths-en', 'maths-en-hard-3', str(tmp_path / 'maths-en-hard-3'), 'lab/base', 3)
    (shipped,) = trainings_in(tmp_path, ['maths-en'], [1])
    assert shipped.target == 'lab/maths-en'
    with pytest.raises(ActError, match='maths-en-hard-4'):
        trainings_in(tmp_path, ['maths-en'], [4], 'hard')
    with pytest.raises(ActError, match='no recipe'):
        trainings_in(tmp_path, ['cooking'], [1])


def test_weights_of_trainings_by_hand():
    of = [('a', 'a-1'), ('a', 'a-1'), ('a', 'a-2'), ('b', 'b-1')]
    weights = training_weights(of, 400, np.random.default_rng(0))
    assert weights[0].tolist() == [0.125, 0.125, 0.25, 0.5]
    first = {tuple(w) for w in weights[1:]}
    assert first == {(0.125, 0.125, 0.25, 0.5), (0.25, 0.25, 0, 0.5), (0, 0, 0.5, 0.5)}


def test_the_bootstrap_by_hand():
    found = result({'attribution': 0.6})
    rng = np.random.default_rng(0)
    trainings = training_weights([('a', 'a-1'), ('a', 'a-2'), ('b', 'b-1')], 300, rng)
    weights = draws(40, 300, rng)
    values = {s: weights @ unpack(items(s), 40) for s in (0.2, 0.6, 1.0)}
    mean = {s: (trainings * v[:, None]).sum(1) for s, v in values.items()}
    by_hand = 100 * (mean[0.6] - mean[0.2]) / (mean[1.0] - mean[0.2])
    assert np.allclose(found.find('attribution', 0.02), by_hand)
    assert np.isclose(by_hand[0], 50)
    assert np.allclose(found.gap('attribution', 'attribution', 0.02), 0)


def test_trainings_that_differ_widen_the_interval():
    low, high = case('a-1', {'attribution': 0.3}), case('a-2', {'attribution': 0.9})
    middle = [case(t, {'attribution': 0.6}) for t in ('a-1', 'a-2')]

    def width(cases):
        d = EqualSizes(cases, n=400).numbers()
        row = d[(d.row == 'attribution') & (d.column == 'recovered')].iloc[0]
        return row.high - row.low

    assert width([low, high]) > 1.5 * width(middle)


def test_differences_are_paired_and_leave_out_the_row_itself():
    d = result({'trade-aware attribution': 0.9, 'weight': 0.9}).differences(columns=('recovered',)).set_index('against')
    assert not {'trade-aware attribution', 'target', 'donor'} & set(d.index)
    assert d.loc['weight', ['difference', 'low', 'high']].tolist() == [0, 0, 0]
    assert (d.holm >= d.p).all()
    assert d.difference['random'] == pytest.approx(87.5)


STRONG = {'trade-aware attribution': 0.95, 'ACT': 0.5}


def test_the_rules_hold_when_all_is_so():
    v = result(STRONG).verdicts().verdict
    assert v.to_dict() == dict(claim='holds', rule='holds', score='holds', goal='holds')


def test_the_rules_refuse_when_the_nulls_show_the_same():
    v = result({**STRONG, 'noise twin (trade-aware)': 0.95, 'random': 0.5}).verdicts().verdict
    assert v.to_dict() == dict.fromkeys(RULES, 'does not hold')


def test_the_rule_of_the_paper_holds_by_its_own_ranking_alone():
    v = result({'trade-aware attribution': 0.95, 'ACT (module-normalised)': 0.5}).verdicts().verdict
    assert v['rule'] == 'in part'


def test_a_claim_that_training_on_the_same_items_beats_holds_in_part():
    v = result({**STRONG, 'tuned on all items': 0.97}).verdicts().verdict
    assert v.to_dict() == dict(claim='in part', rule='holds', score='holds', goal='in part')


def test_a_claim_that_costs_too_much_holds_in_part():
    v = result({'trade-aware attribution': 0.95}, retained=0.9).verdicts().verdict
    assert v['claim'] == 'in part'
    assert v['goal'] == 'in part'
    assert v['rule'] == 'does not hold'


def test_a_causal_rival_that_does_as_well_leaves_the_score_in_part():
    v = result({**STRONG, 'repeated attribution': 0.95}).verdicts()
    assert v.verdict['score'] == 'in part'
    assert 'repeated attribution' in v.numbers['score']


def test_every_verdict_is_a_sentence():
    words = in_words(result(STRONG))
    assert words.count('Claimed: ') == len(RULES) == words.count('Measured: ')


def test_what_was_not_measured_is_said():
    found = result(STRONG)
    with pytest.raises(ActError, match='was not measured at 5 %'):
        found.find('random', 0.05)
    with pytest.raises(ActError, match='after fine-tuning'):
        found.find('random', 0.02, tuned=True)
    with pytest.raises(ActError, match='no case'):
        found.part(recipes=['none'])


def test_targets_that_lost_nothing_are_refused():
    with pytest.raises(ActError, match='lost nothing'):
        result({'target': 1.0}).verdicts()


def test_the_best_size_is_chosen_on_validation_items():
    one = case('a-1', {'random': 0.4})
    (small,) = [m for m in one['models'] if m['row'] == 'random']
    one['models'].append({**small, 'p': 0.5, 'test': small['test'] | {'science-zh': items(0.2)}})
    one['models'][-1]['validation'] = small['validation'] | {'science-zh': 0.9}
    best = EqualSizes([one], n=10).best().set_index(['row', 'column'])
    assert best.p['random', 'net'] == 0.5
    assert best.value['random', 'recovered'] == 0


def test_a_stage_that_only_some_trainings_have_is_read_from_those():
    one, other = (case(t, {'random': share}) for t, share in (('a-1', 0.4), ('a-2', 0.8)))
    (model,) = [m for m in one['models'] if m['row'] == 'random']
    one['models'].append({**model, 'tuned': True, 'test': model['test'] | {'science-zh': items(0.6)}})
    found = EqualSizes([one, other], n=50)
    assert found.find('random', 0.02)[0] == pytest.approx(50)
    assert found.find('random', 0.02, tuned=True)[0] == pytest.approx(50)
    assert found.trainings().loc['a'].to_dict() == dict(before=2, after=1)
    alone = EqualSizes([one], n=50)
    assert np.allclose(found.find('random', 0.02, tuned=True), alone.find('random', 0.02, tuned=True))


@pytest.fixture(scope='module')
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp('sizes')
    rows = ['target', 'donor', 'random', 'ACT', 'interpolation', 'tuned on the items']
    options = dict(sizes=(0.02, 0.1), tuned=(), rows=rows, n=4, items=8, others_at=(0.02,), progress=False)
    trained = [Training('maths-en', 'maths-en', 'lab/maths-en')]
    return folder, trained, options, measure_sizes(trained, folder, **options)


def test_a_measured_case_is_complete(measured):
    _, _, _, paths = measured
    assert [p.name for p in paths] == ['maths-en-science.json', 'maths-en-arithmetic.json']
    d = json.loads(paths[1].read_text())
    assert d['case']['target'] == 'maths-en'
    assert len(d['models']) == 2 + 2 * 3 + 2 + 2 + 1
    for m in d['models']:
        assert len(m['test']) == (2 if m['p'] == 0.1 else 13)
        assert set(m['validation']) == {'arithmetic-zh', 'multiplication-en'}
        assert all(len(unpack(v, 4)) == 4 for v in m['test'].values())
    assert {'git', 'versions', 'machine', 'weights', 'data', 'seed', 'seconds', 'scores'} <= set(d['meta'])


def test_a_file_that_exists_is_left_and_parts_share_the_work(measured, tmp_path):
    folder, trained, options, paths = measured
    before = [p.read_bytes() for p in paths]
    assert measure_sizes(trained, folder, **options) == paths
    assert [p.read_bytes() for p in paths] == before
    few = dict(options, rows=['target'], sizes=())
    second = measure_sizes(trained, tmp_path, part=(2, 2), **few)
    assert [p.exists() for p in second] == [False, True]


@pytest.mark.filterwarnings('ignore:.*divide')
def test_files_are_joined_and_read(measured, tmp_path):
    folder, trained, options, _ = measured
    found = EqualSizes.load(gather(folder, tmp_path / 'all.json'))
    assert len(found.cases) == 2
    assert found.find('donor', 0)[0] == 100
    odd = tmp_path / 'odd'
    odd.mkdir()
    for i, rows in enumerate((['target'], ['target', 'donor'])):
        measure_sizes(trained, odd / str(i), ['science'], **dict(options, rows=rows, sizes=()))
        (odd / str(i) / 'maths-en-science.json').rename(odd / f'{i}.json')
    with pytest.raises(ActError, match='measured different rows'):
        gather(odd, tmp_path / 'x.json')
