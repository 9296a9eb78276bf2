"Abilities: answer positions by character offsets, padding on either side, files and sources that say what is wrong."

import json, warnings, pytest, torch
from act.abilities import Ability, Item, read_jsonl
from act.encoding import batches, encode
from act.sources import SHARES, SOURCES, SPLIT_FROM, load_ability, short_name
from act.kit.errors import ActError
from act.kit.processes import ActWarning
from act.kit.records import sha256
from conftest import tiny_model

ITEMS = [Item('two plus two is', ' four'), Item('五和六', '共十一'), Item('q:', ' ocho')]


def test_a_file_and_its_splits_have_one_name(tmp_path):
    Ability('x', ITEMS).save(tmp_path / 'sums-test.jsonl')
    assert load_ability(tmp_path / 'sums-test.jsonl', 'all').name == short_name('sums-test.jsonl') == 'sums-test'


def text_at(tok, encoded, item):
    "What the tokens at the answer positions spell."
    return tok.decode([encoded.input_ids[i] for i in encoded.answer])


def test_answer_tokens_spell_the_answer(tokenizer):
    for o, e in zip(ITEMS, encode(ITEMS, tokenizer)):
        assert text_at(tokenizer, e, o) == o.answer
        assert e.positions == e.answer


def test_by_hand_one_byte_a_token(tokenizer):
    e = encode([Item('xyz', 'wv')], tokenizer)[0]
    assert len(e.input_ids) == 5
    assert e.positions == [3, 4]
    assert encode([Item('xyz', 'wv')], tokenizer, positions='predict')[0].positions == [2, 3]


def test_a_token_across_the_border_counts_as_answer(tokenizer):
    whole = tokenizer('two plus')['input_ids']
    e = encode([Item('two pl', 'us')], tokenizer)[0]
    assert e.input_ids == whole
    assert e.answer[-1] == len(whole) - 1
    assert len(e.answer) >= 1


def test_nothing_is_inserted_between_prompt_and_answer(tokenizer):
    e = encode([Item('abc', 'def')], tokenizer)[0]
    assert e.input_ids == tokenizer('abcdef')['input_ids']
    assert tokenizer.eos_token_id not in e.input_ids


def test_the_end_of_text_is_added_when_asked(tokenizer):
    e = encode([Item('abc', 'd')], tokenizer, eos=True)[0]
    assert e.input_ids[-1] == tokenizer.eos_token_id
    assert e.answer == [3, 4]


@pytest.mark.parametrize('side', ['left', 'right'])
def test_padding_by_hand(tokenizer, side):
    enc = encode([Item('abcd', 'ef'), Item('x', 'y')], tokenizer)
    (b,) = batches(enc, tokenizer, padding_side=side, alike=0)
    pad = [tokenizer.pad_token_id] * 4
    assert b['index'] == [0, 1]
    assert b['input_ids'][1].tolist() == (pad + enc[1].input_ids if side == 'left' else enc[1].input_ids + pad)
    assert b['positions'][1].tolist() == [False] * 5 + [True] if side == 'left' else [False, True] + [False] * 4
    assert b['position_ids'][1].tolist()[-2 if side == 'left' else 0 :][:2] == [0, 1]
    assert b['attention_mask'].sum().item() == 8


@pytest.mark.parametrize('side', ['left', 'right'])
def test_padding_does_not_change_what_the_model_computes(tokenizer, side):
    model, enc = tiny_model(), encode(ITEMS, tokenizer)
    for b in batches(enc, tokenizer, padding_side=side, alike=0):
        logits = model(
            input_ids=b['input_ids'], attention_mask=b['attention_mask'], position_ids=b['position_ids']
        ).logits[b['positions']]
        alone = torch.cat([model(torch.tensor([enc[i].input_ids])).logits[0, enc[i].positions] for i in b['index']])
        assert torch.allclose(logits, alone, atol=1e-5)


def test_batches_hold_every_item_once_within_budget(tokenizer):
    items = [Item('a' * n, 'b') for n in (30, 3, 12, 7, 50, 1)]
    bs = list(batches(encode(items, tokenizer), tokenizer, batch_tokens=60))
    assert sorted(i for b in bs for i in b['index']) == list(range(6))
    assert all(b['input_ids'].numel() <= 60 for b in bs)


def test_little_of_a_batch_is_padding(tokenizer):
    enc = encode([Item('a' * n, 'b') for n in range(1, 120)], tokenizer)
    share = lambda **kw: [1 - b['attention_mask'].float().mean().item() for b in batches(enc, tokenizer, **kw)]
    assert max(share()) <= 1 / 8 < max(share(alike=0))


def test_cutting_keeps_what_fits_and_an_empty_ability_is_named(tokenizer):
    short, long = Item('a', 'b'), Item('a' * 50, 'b')
    assert len(encode([short, long], tokenizer, max_length=20)) == 1
    with pytest.raises(ActError, match='ability maths-en has no answer tokens left after cutting at 20'):
        encode(Ability('maths-en', [long]), tokenizer, max_length=20)


def test_chat_needs_a_template(tokenizer):
    with pytest.raises(ActError, match='no chat template'):
        encode(ITEMS, tokenizer, chat=True)


def test_a_slow_tokenizer_is_refused(tokenizer):
    class Slow:
        is_fast = False

    with pytest.raises(ActError, match='fast tokenizer'):
        encode(ITEMS, Slow())


def test_positions_unknown(tokenizer):
    with pytest.raises(ActError, match="'read' or 'predict'"):
        encode(ITEMS, tokenizer, positions='all')


@pytest.mark.parametrize(
    'text, words',
    [
        ('{"prompt": "a", "answer": "b"}\nnot json\n', 'line 2: not JSON'),
        ('{"prompt": "a"}\n', 'line 1: no text under'),
        ('\n{"prompt": "a", "answer": true}\n', 'line 2: no text'),
        ('{"prompt": 3, "answer": "b"}\n', 'line 1: no text'),
        ('{"prompt": "a", "answer": "b", "choices": ["b", false]}\n', 'line 1: "choices"'),
        ('{"prompt": "a", "answer": NaN}\n', 'line 1: not JSON'),
        ('[1]\n', 'line 1'),
        ('{"prompt": "a", "answer": "  "}\n', 'line 1: the answer is empty'),
        ('', 'holds no items'),
        ('\n\n', 'holds no items'),
    ],
)
def test_bad_jsonl_names_file_and_line(tmp_path, text, words):
    (tmp_path / 'mine.jsonl').write_text(text)
    with pytest.raises(ActError, match=words) as e:
        load_ability(tmp_path / 'mine.jsonl')
    assert 'mine.jsonl' in str(e.value)


def test_bytes_that_are_not_text(tmp_path):
    (tmp_path / 'x.jsonl').write_bytes(b'\xff\xfe\x00')
    with pytest.raises(ActError, match='x.jsonl cannot be read as UTF-8'):
        read_jsonl(tmp_path / 'x.jsonl')
    with pytest.raises(ActError, match='absent.jsonl'):
        read_jsonl(tmp_path / 'absent.jsonl')


def test_numbers_stand_for_their_digits(tmp_path):
    (tmp_path / 'x.jsonl').write_text(
        '\n'.join(
            '{"prompt": "a", "answer": %s, "choices": [%s, 7, "b"]}' % (o, o)
            for o in ('3', '3.0', '-0.50', '1e3', '12345678901234567890')
        )
    )
    a = read_jsonl(tmp_path / 'x.jsonl')
    assert [o.answer for o in a] == ['3', '3.0', '-0.50', '1e3', '12345678901234567890']
    assert a[1].choices == ('3.0', '7', 'b')
    assert all(type(s) is str for o in a for s in (o.answer, *o.choices))


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / 'x.jsonl').write_bytes(b'\xef\xbb\xbf{"prompt": "a", "answer": "b"}\n')
    assert read_jsonl(tmp_path / 'x.jsonl')[0] == Item('a', 'b', 'x.jsonl:1')


def test_a_file_is_split_by_its_prompts(tmp_path):
    items = [Item(f'q{i // 2}', str(i)) for i in range(2 * SPLIT_FROM)]  # every prompt twice
    path = Ability('mine', items).save(tmp_path / 'mine.jsonl')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        parts = {s: load_ability(path, s) for s in SHARES}
        assert len(load_ability(path, 'all')) == len(items)
    assert sum(map(len, parts.values())) == len(items)
    prompts = [{o.prompt for o in p} for p in parts.values()]
    assert sum(map(len, prompts)) == len(set().union(*prompts)) == SPLIT_FROM
    moved = Ability('other', items[::-1]).save(tmp_path / 'other.jsonl')
    assert {o.prompt for o in load_ability(moved, 'sft')} == {o.prompt for o in parts['sft']}
    assert load_ability(path).source == 'mine.jsonl test'
    with pytest.raises(
        ActError, match='no split is called .dev.: choose one of train, localize, sft, validation, test or all'
    ):
        load_ability(path, 'dev')


def test_a_small_file_is_used_whole_and_says_so(tmp_path):
    path = Ability('mine', [Item(str(i), 'b') for i in range(SPLIT_FROM - 1)]).save(tmp_path / 'mine.jsonl')
    with pytest.warns(ActWarning, match='mine.jsonl has fewer than 100 items .99. and is used whole as split sft'):
        assert len(load_ability(path, 'sft')) == 99
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert len(load_ability(path, 'all')) == 99


def test_hashes_of_items():
    a = Ability('x', [Item('p', 'a', id='1'), Item('p', 'b')])
    assert a.item_hashes == [sha256('p', 'a')[:12], sha256('p', 'b')[:12]]
    assert all(len(h) == 12 for h in a.item_hashes)


def test_jsonl_round_trip(tmp_path):
    a = Ability('maths-sw', ITEMS)
    b = load_ability(str(a.save(tmp_path / 'maths-sw.jsonl')), 'all')
    assert a.hash == b.hash
    assert (b.skill, b.language, b.eos) == ('maths', 'sw', False)


def test_an_ability_without_items_or_answers():
    with pytest.raises(ActError, match='has no items'):
        Ability('x', [])
    with pytest.raises(ActError, match='item 1 .* empty answer'):
        Ability('x', [Item('a', 'b'), Item('a', ' ')])


def test_samples_repeat_and_know_their_limits():
    a = Ability('x', [Item(str(i), 'b') for i in range(20)], eos=True)
    assert a.sample(5, 1).hash == a.sample(5, 1).hash != a.sample(5, 2).hash
    assert a.sample(5).eos
    assert a[:3].eos
    with pytest.raises(ActError, match='21 items asked'):
        a.sample(21)


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    "A small local mirror of every source."

    def put(name, rows):
        f = tmp_path / name
        f.parent.mkdir(exist_ok=True)
        f.write_text(''.join(json.dumps(r, ensure_ascii=False) + '\n' for r in rows))

    for f in ('train', 'test'):
        put(
            f'gsm8k/{f}.jsonl',
            [dict(question=f'{f} {i}?', answer=f'So <<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}') for i in range(60)],
        )
    for o in ('en', 'es'):
        put(f'mgsm/{o}.jsonl', [dict(question=f'{o} {i}?', answer_number=i, answer=None) for i in range(60)])
        put(
            f'xquad/{o}.jsonl',
            [
                dict(context=f'{o} paragraph {i // 3} with some words in it', question=f'{i}?', answers=[f'answer {i}'])
                for i in range(180)
            ],
        )
    monkeypatch.setenv('ACT_DATA', str(tmp_path))
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')


@pytest.mark.parametrize('spec', ['gsm8k/en', 'mgsm/es', 'xquad/es', 'xquad-text/en'])
def test_splits_of_a_source_are_disjoint_and_lose_nothing(mirror, spec):
    parts = {}
    for s in SHARES:
        try:
            parts[s] = {(o.prompt, o.answer) for o in load_ability(spec, s)}
        except ActError as e:
            assert 'has no items' in str(e)
    assert {'test', 'localize', 'sft', 'validation'} <= set(parts)
    assert (
        sum(map(len, parts.values()))
        == len(set().union(*parts.values()))
        == dict(gsm8k=120, mgsm=60, xquad=180).get(spec.split('/')[0], 60)
    )


@pytest.mark.parametrize('spec', ['gsm8k/en', 'mgsm/es', 'xquad/es', 'xquad-text/en'])
def test_all_of_a_source(mirror, spec):
    whole = load_ability(spec, 'all')
    assert (
        len(whole)
        == dict(gsm8k=120, mgsm=60, xquad=180).get(spec.split('/')[0], 60)
        == len({o.id + o.prompt for o in whole})
    )
    assert set(load_ability(spec, 'test').item_hashes) < set(whole.item_hashes)


def test_parallel_paragraphs_share_a_split(mirror):
    for s in SHARES:
        a, b = ({o.id.split('/')[-1] for o in load_ability(f'xquad-text/{o}', s)} for o in ('en', 'es'))
        assert a == b


def test_worked_answers_lose_their_calculator_notes(mirror):
    o = load_ability('gsm8k/en')[0]
    assert o.answer.startswith(' So ')
    assert '<<' not in o.answer
    assert '####' in o.answer


@pytest.mark.parametrize(
    'source, row',
    [
        ('arc-easy', dict(question='q', choices=['a', 'b', 'c'], labels=['1', '2', '3'], answer='2')),
        ('arc-easy', dict(question='q', choices=dict(text=['a', 'b', 'c'], label=['A', 'B', 'C']), answerKey='B')),
        ('openbookqa', dict(question_stem='q', choices=['a', 'b', 'c'], labels=['A', 'B', 'C'], answer='B')),
        ('openbookqa', dict(question_stem='q', choices=dict(text=['a', 'b'], label=['A', 'B']), answerKey='B')),
        ('sciq', dict(question='q', correct_answer='b', distractor1='a', distractor2='c', distractor3='d', support='')),
        ('piqa', dict(goal='q', sol1='a', sol2='b', label=1)),
    ],
)
def test_questions_are_asked_without_their_choices_and_ties_are_wrong(source, row):
    prompt, answer, choices = SOURCES[source].item(row)
    assert (prompt, answer) == ('Question: q\nAnswer:', ' b')
    assert choices[0] == ' a'
    assert choices[-1] == ' b'
    assert len(set(choices)) == len(choices) >= 2


def test_passages_stay_in_the_split_of_their_questions(monkeypatch, tmp_path):
    wrong = {f'distractor{k}': f'not {k}' for k in (1, 2, 3)}
    texts = ['' if i % 4 == 0 else f'A passage about the number {i}.' for i in range(60)]
    rows = [dict(question=f'q {i}', correct_answer='a', **wrong, support=text) for i, text in enumerate(texts)]
    (tmp_path / 'sciq').mkdir()
    (tmp_path / 'sciq' / 'validation.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    monkeypatch.setenv('ACT_DATA', str(tmp_path))
    split = lambda source: {o.id.split('/')[-1]: o for o in load_ability(f'{source}/en', 'localize')}
    asked, told = split('sciq'), split('sciq-text')
    assert set(told) == {i for i in asked if int(i) % 4}
    assert all(o.prompt + o.answer == texts[int(i)] for i, o in told.items())
    assert all(o.prompt and o.answer and not o.choices for o in told.values())


def test_a_language_that_a_source_lacks_is_refused(mirror):
    for spec, known in (('gsm8k/es', 'en'), ('sciq/de', 'en'), ('exams/xx', 'ar, bg')):
        with pytest.raises(ActError, match=f"has no language .{spec[-2:]}.: choose one of {known}"):
            load_ability(spec)
    assert load_ability('mgsm/es', 'all')


def test_no_data_names_both_ways(monkeypatch, tmp_path):
    monkeypatch.setenv('ACT_DATA', str(tmp_path))
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    with pytest.raises(ActError, match='ACT_DATA.*openai/gsm8k'):
        load_ability('gsm8k/en')
    monkeypatch.delenv('ACT_DATA')
    with pytest.raises(ActError, match='ACT_DATA.*juletxara/mgsm'):
        load_ability('mgsm/sw')


def test_unknown_names_and_splits(mirror):
    with pytest.raises(ActError, match='no ability is called'):
        load_ability('poetry/en')
    with pytest.raises(ActError, match='no split is called'):
        load_ability('gsm8k/en', 'dev')
    with pytest.raises(ActError, match='no lab ability'):
        load_ability('lab/poetry-en')
    with pytest.raises(ActError, match='no split is called .all.: choose one of train'):
        load_ability('lab/science-en', 'all')  # generated for each split
