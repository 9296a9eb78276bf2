"Evaluate: lm-eval's numbers equal hand-made ones; paired statistics equal textbook values; files come back."

import json, math, warnings, pytest, numpy as np, torch
from act.abilities import Ability, Item
from act.loading import load_model
from act.kit.errors import ActError
from act.kit.processes import ActWarning
from act.answers import compare_answers, read_answer, read_number
from act.commands.way import act_evaluate
from act.evaluate import EvalResult, evaluate
from act.harness import TASKS, write_tasks
from act.stats import METRICS, bootstrap_ci, holm, interval_text, mcnemar, paired_bootstrap, two_sided_p
from conftest import tiny_model

ABILITY = Ability('toy-en', [Item('two plus two is', ' four'), Item('cuatro y', ' cuatro son'), Item('x', 'y')])


def by_hand(model, tok, item, end=''):
    p, a = tok(item.prompt)['input_ids'], tok(item.answer + end)['input_ids']
    logp = model(torch.tensor([p + a])).logits[0].log_softmax(-1).detach()[len(p) - 1 : -1]
    return logp.gather(1, torch.tensor(a)[:, None]).sum().item(), int(
        all(logp.argmax(-1).tolist()[i] == t for i, t in enumerate(a))
    )


@pytest.mark.parametrize('eos', [False, True])
def test_loglikelihoods_by_hand(family, tokenizer, eos):
    model = tiny_model(family)
    items = evaluate(model, ABILITY, tokenizer, eos=eos, progress=False).items
    for o, ll, ok in zip(ABILITY, items.loglik, items.correct):
        want = by_hand(model, tokenizer, o, tokenizer.eos_token if eos else '')
        assert abs(ll - want[0]) < 1e-3
        assert ok == want[1]


def test_the_lab_agrees_with_greedy_decoding():
    from act.zoo.lab import lab_ability

    model, tok = load_model('lab/swahili', dtype='float32')
    a = lab_ability('science-tr', n=12)
    items = evaluate(model, a, tok, progress=False).items
    for o, ok in zip(a, items.correct):
        out = model.generate(**tok(o.prompt, return_tensors='pt'), max_new_tokens=12, do_sample=False)
        text = tok.decode(out[0][len(tok(o.prompt)['input_ids']) :])
        assert ok == (text.startswith(o.answer + tok.eos_token)), (o, text)
    assert 0 < items.correct.mean() < 1


def test_generation_reads_the_last_number():
    from act.zoo.lab import lab_ability

    model, tok = load_model('lab/base', dtype='float32')
    a = lab_ability('arithmetic-en', n=4)
    r = evaluate(model, a, tok, generate=True, progress=False)
    last = [text.split('=')[-1] for text in r.items.text]
    assert r.items.read.tolist() == last
    assert r.items.correct.tolist() == [o.answer.split('=')[-1] == n for o, n in zip(a, last)]
    assert 0 < r.items.correct.mean() < 1
    assert math.isnan(r.table().bits_per_byte.iloc[0])
    assert r.bits.isna().all()
    assert compare_answers(dict(answer=' 1,200'), ['it is 1200.00']) == dict(exact_match=1)
    assert compare_answers(dict(answer='blue'), ['blue sky']) == dict(exact_match=0)


def test_the_table_by_hand(tokenizer):
    model = tiny_model()
    r = evaluate(model, ABILITY, tokenizer, progress=False)
    t = r.table().loc['toy-en']
    assert t['items'] == 3
    assert t.accuracy == r.items.correct.mean()
    assert t.bits_per_byte == pytest.approx(
        -r.items.loglik.sum() / math.log(2) / sum(len(o.answer.encode()) for o in ABILITY)
    )
    assert list(r.bits) == pytest.approx(
        [-l / math.log(2) / len(o.answer.encode()) for l, o in zip(r.items.loglik, ABILITY)]
    )


def test_several_abilities_keep_their_items_apart(tokenizer):
    b = Ability('toy-es', [Item('cuatro', ' ocho')])
    both = evaluate(tiny_model(), [ABILITY, b], tokenizer, progress=False).items
    alone = evaluate(tiny_model(), b, tokenizer, progress=False).items
    assert both.ability.tolist() == ['toy-en'] * 3 + ['toy-es']
    assert both.loglik.iloc[3] == pytest.approx(alone.loglik[0], abs=1e-4)
    with pytest.raises(ActError, match='share a name'):
        evaluate(tiny_model(), [ABILITY, ABILITY], tokenizer)
    with pytest.raises(ActError, match='no abilities'):
        evaluate(tiny_model(), [], tokenizer)


def test_global_seeds_stay_as_they_were(tokenizer):
    torch.manual_seed(3)
    np.random.seed(3)
    want = torch.rand(1), np.random.rand()
    torch.manual_seed(3)
    np.random.seed(3)
    evaluate(tiny_model_cached(), ABILITY, tokenizer, progress=False)
    assert (torch.rand(1), np.random.rand()) == want


def tiny_model_cached(_m=[]):
    if not _m:
        state = torch.get_rng_state()
        _m.append(tiny_model())
        torch.set_rng_state(state)
    return _m[0]


def test_results_come_back(tokenizer, tmp_path):
    r = evaluate(tiny_model(), ABILITY, tokenizer, progress=False)
    again = EvalResult.load(r.save(tmp_path / 'r.json'))
    assert again.table().round(4).equals(r.table().round(4))
    assert again.meta == r.meta
    assert again.meta['abilities']['toy-en']['hash'] == ABILITY.hash
    assert again.meta['lm_eval']
    (tmp_path / 'r.json').write_text('{"format": "other"}')
    with pytest.raises(ActError, match='not of the format act-eval-1'):
        EvalResult.load(tmp_path / 'r.json')
    with pytest.raises(ActError, match='not a readable'):
        EvalResult.load(tmp_path / 'absent.json')


def test_the_task_files_work_in_plain_lm_eval():
    "With lm-eval's own model class, which ignores the end-of-text token; the lab's prompts end in a full word."
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from act.zoo.lab import lab_ability

    model, tok = load_model('lab/maths-en', dtype='float32')
    out = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=tok, batch_size=64),
        tasks=['act_lab_science_el'],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        bootstrap_iters=0,
    )
    assert (
        out['results']['act_lab_science_el']['acc,none']
        == evaluate(model, lab_ability('science-el'), tok, eos=False, progress=False).items.correct.mean()
    )


@pytest.mark.parametrize(
    'text, language, want',
    [
        ('Das sind 1.000 Euro', 'de', '1000'),
        ('1.000.000', None, '1000000'),
        ('1.234.567,5', 'de', '1234567.5'),
        ('exactement 1 000 €', 'fr', '1000'),
        ('1\u202f000,5', 'fr', '1000.5'),
        ('1\u00a0000', 'ru', '1000'),
        ('1\u2009000', None, '1000'),
        ('1 000', None, '1000'),
        ('1 000', 'en', '0'),
        ('1.000', 'en', '1'),
        ('1,000', 'en', '1000'),
        ('1,000.50', 'de', '1000.5'),
        ('1.000,50', 'en', '1000.5'),
        ('3,5', None, '3.5'),
        ('3,5', 'es', '3.5'),
        ('(3,5)', 'en', '5'),
        ('3.5', 'de', '3.5'),
        ('1,5', 'ru', '1.5'),
        ('1,00,000', 'hi', '100000'),
        ('₹12,34,567.50', None, '1234567.5'),
        ('1,00,000', 'te', '100000'),
        ("1'000'000", 'de', '1000000'),
        ('1’000.25', None, '1000.25'),
        ('1٬000٫5', 'ar', '1000.5'),
        ('٤٢', 'ar', '42'),
        ('١٬٠٠٠', None, '1000'),
        ('২৩', 'bn', '23'),
        ('๑๒๓', 'th', '123'),
        ('౪౨', 'te', '42'),
        ('４２', 'ja', '42'),
        ('１，０００', 'ja', '1000'),
        ('−5', None, '-5'),
        ('–5', None, '-5'),
        ('－5', 'zh', '-5'),
        ('答案是-5。', 'zh', '-5'),
        ('-$1,000.50', 'en', '-1000.5'),
        ('$-3', None, '-3'),
        ('3-5', None, '5'),
        ('3–5', None, '5'),
        ('10 − 3 = 7', None, '7'),
        ('9-4', None, '4'),
        ('COVID-19', None, '19'),
        ('Ту-154', 'ru', '154'),
        ('(2)-1', None, '1'),
        ('\u200f-5', 'ar', '-5'),
        ('= 42.', None, '42'),
        ('42%', None, '42'),
        ('42 %', 'fr', '42'),
        ('$1,000.50', 'en', '1000.5'),
        ('**42**', None, '42'),
        ('**1,000**', 'en', '1000'),
        ('*-5*', None, '-5'),
        ('`7`', None, '7'),
        (r'\boxed{1{,}000}', 'en', '1000'),
        (r'1\,000', None, '1000'),
        ('# 8', None, '8'),
        ('2024-05-12', None, '12'),
        ('am 12.05.2020', 'de', '2020'),
        ('5/12/2020', None, '2020'),
        ('3:30', None, '30'),
        ('1, 2, 3', None, '3'),
        ('1,2,3', 'en', '3'),
        ('in 2020, 100 people', None, '100'),
        ('2020 100', None, '100'),
        ('v1.2.3', None, '3'),
        ('27.0', None, '27'),
        ('27.50', None, '27.5'),
        ('0.500', 'de', '0.5'),
        ('0,125', 'de', '0.125'),
        ('007', None, '7'),
        ('-0', None, '0'),
        ('x²', None, None),
        ('none', None, None),
        ('', None, None),
        ('9' * 400, None, '9' * 400),
    ],
)
def test_numbers_as_people_write_them(text, language, want):
    assert read_number(text, language) == want


@pytest.mark.parametrize(
    'answer, language, text, right',
    [
        ('1000', None, '1.000', 1),
        ('1000', None, '1 000', 1),
        ('3.5', None, '3,5', 1),
        ('42', None, '٤٢', 1),
        ('-5', None, '−5', 1),
        ('5', None, '−5', 0),
        ('1000', None, '1,000', 1),
        ('42', None, '**42**', 1),
        ('1.5', None, '1.500', 1),
        ('1', None, '1.000', 0),
        ('1000', 'en', '1.000', 0),
        ('1', 'en', '1.000', 1),
        ('1000', 'de', '1,000', 1),
        ('3.25', 'de', '3,250', 1),
        ('3.25', 'de', '3.250', 0),
        ('1000', 'es', '1.000 euros.', 1),
        ('42', 'th', 'คำตอบคือ ๔๒', 1),
        ('12', None, 'I do not know', 0),
    ],
)
def test_the_right_answer_says_how_a_number_is_read(answer, language, text, right):
    assert compare_answers(dict(answer=answer, language=language), [text]) == dict(exact_match=right)


def test_what_was_read_is_text_where_the_answer_has_no_number():
    assert read_answer(dict(answer='blue'), ' the 2nd, blue ') == 'the 2nd, blue'
    assert read_answer(dict(answer=' = 4'), 'many') is None


def test_several_processes_return_what_one_does(tmp_path, launch):
    "Three processes: more than the second ability has items; scored, picked and written."
    Ability('pick', [Item('one and one', ' 2', choices=(' 2', ' 11', ' two of them'))]).save(tmp_path / 'pick.jsonl')
    model, names = 'lab/maths-en', f"lab/science-zh,{tmp_path / 'pick.jsonl'}"
    kw = dict(batch_size=16, dtype='bfloat16')
    done = launch(
        'act_evaluate',
        '--model',
        model,
        '--ability',
        names,
        '--batch_size',
        16,
        '--dtype',
        'bfloat16',
        '--out',
        tmp_path / 'three.json',
        n=3,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count('science-zh') == 1, done.stderr[-2000:]
    act_evaluate(model=model, ability=names, out=tmp_path / 'one.json', device_map='auto', **kw)
    one, three = (EvalResult.load(tmp_path / f'{n}.json') for n in ('one', 'three'))
    assert one.items.equals(three.items)
    assert one.meta['weights'] == three.meta['weights']


def test_items_that_were_trained_on_are_named(checkpoint, tmp_path, capsys):
    ability = Ability('toy-en', [Item(f'two plus {i}', ' four') for i in range(4)])
    path, folder = ability.save(tmp_path / 'toy-en.jsonl'), checkpoint('tuned')
    run = lambda: act_evaluate(model=str(folder), ability=str(path), split='all')
    with warnings.catch_warnings():
        warnings.simplefilter('error', ActWarning)
        run()
        (folder / 'act_finetune.json').write_text(json.dumps(dict(trained_on=['0' * 12])))
        run()
    (folder / 'act_finetune.json').write_text(json.dumps(dict(trained_on=ability.item_hashes[1:3])))
    with pytest.warns(ActWarning, match='2 of the 4 items of ability toy-en were trained on .notes of tuned.'):
        run()


def test_bootstrap_interval_of_a_known_case():
    x = np.r_[np.ones(50), np.zeros(50)]
    low, high = bootstrap_ci(x)
    assert low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.012)
    assert high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.012)
    assert bootstrap_ci(x) == (low, high)
    assert bootstrap_ci([0, 0, 0]) == (0, 0)
    with pytest.raises(ActError):
        bootstrap_ci([])


def test_paired_bootstrap_uses_the_pairs():
    rng = np.random.default_rng(0)
    hard = rng.normal(size=200) * 10
    a, b = hard + 0.5 + rng.normal(size=200) * 0.1, hard
    r = paired_bootstrap(a, b)
    assert r['low'] > 0.45
    assert r['high'] < 0.55
    assert r['p'] < 0.002
    assert paired_bootstrap(b, b)['p'] == 1
    with pytest.raises(ActError, match='cannot be paired'):
        paired_bootstrap([1], [1, 2])


def test_mcnemar_by_hand():
    assert mcnemar([1, 1, 1, 0], [0, 0, 0, 0]) == dict(only_a=3, only_b=0, p=0.25)
    assert mcnemar([1, 0], [1, 0])['p'] == 1
    with pytest.raises(ActError, match='cannot be paired'):
        mcnemar([1], [1, 0])


def test_a_p_value_counts_the_rarer_side():
    samples = np.r_[0.5, np.full(90, 1.0), np.full(9, -1.0)]
    assert two_sided_p(samples) == pytest.approx(2 * (9 + 1) / 100)
    assert two_sided_p(np.zeros(100)) == 1


def test_one_text_for_an_estimate():
    assert interval_text((0.5, 0.25, 0.75)) == '0.50 [0.25, 0.75]'
    assert interval_text(dict(value=0.5, low=-0.25, high=0.75), 100, 1, signed=True) == '+50.0 [-25.0, +75.0]'


def test_metrics_know_which_way_is_better():
    correct, bits = METRICS['correct'], METRICS['bits']
    assert [correct.side(0.1, 0.2), correct.side(-0.2, -0.1), correct.side(-0.1, 0.1)] == ['better', 'worse', 'tie']
    assert [bits.side(0.1, 0.2), bits.side(-0.2, -0.1), bits.side(0, 0.1)] == ['worse', 'better', 'tie']
    assert correct.text((0.5, 0.25, 0.75)) == '50.0 [25.0, 75.0]'
    assert bits.text((0.5, 0.25, 0.75), signed=True) == '+0.500 [+0.250, +0.750]'
    assert [m.label() for m in (correct, bits)] == ['% of test items', 'bits per byte, lower is better']


def test_the_shipped_tasks_are_what_write_tasks_writes(tmp_path):
    from act.zoo.lab import lab_abilities

    names = write_tasks(tmp_path, lab_abilities())
    shipped = {p.stem: p.read_text() for p in TASKS.glob('act_*_*.yaml')}
    assert {name: (tmp_path / f'{name}.yaml').read_text() for name in names} == shipped


def test_progress_off_means_silence(tokenizer, capfd, monkeypatch):
    monkeypatch.delenv('TQDM_DISABLE', raising=False)
    evaluate(tiny_model(), ABILITY, tokenizer, progress=False)
    out, err = capfd.readouterr()
    assert out == ''
    assert '%|' not in err


def test_holm_by_hand_and_in_any_order():
    ps = [0.01, 0.04, 0.03, 0.005]
    assert holm(ps).tolist() == pytest.approx(
        [0.03, 0.06, 0.06, 0.02]
    )  # .005 x 4, .01 x 3, .03 x 2, then never falling
    assert holm(ps[::-1]).tolist() == holm(ps)[::-1].tolist()
    assert holm([0.9, 0.8]).tolist() == [1, 1]
    assert len(holm([])) == 0
