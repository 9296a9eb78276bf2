"One encoding for all stages: which ids a model sees, and which of them are the answer, in chat and without it."

import copy, json, os, pytest, torch
from lm_eval.api.instance import Instance
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from act.abilities import Ability, Item
from act.encoding import EncodedItem, check_fits, encode, encode_prompts, reads, render
from act.sources import SOURCES, load_ability
from act.kit.errors import ActError
from act.answers import read_number
from act.commands.way import act_evaluate
from act.evaluate import EvalResult, evaluate
from act.harness import ActLM
from conftest import tiny_config

QWEN3 = (
    "{%- for m in messages %}{%- if m.role == 'user' %}{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}{%- else"
    " %}{{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor"
    " %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
R1 = (
    "{%- for m in messages %}{%- if m.role == 'user' %}{{'<|User|>' + m.content}}{%- else %}{% set c = m.content %}{%"
    " if '</think>' in c %}{% set c = c.split('</think>')[-1] %}{% endif %}{{'<|Assistant|>' + c +"
    " '<|end_of_sentence|>'}}{%- endif %}{%- endfor %}{% if add_generation_prompt %}{{'<|Assistant|><think>\\n'}}{%"
    " endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content |"
    " trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{"
    " '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}{{"
    " '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt"
    " %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}{%"
    " endfor %}</{{ m.role }}>{% endfor %}"
)
ANSWER_PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'user' %}{{ m.content }}{% else %}{% for c in m.content %}{{"
    " c.text }}{% endfor %}{% endif %}</{{ m.role }}>{% endfor %}"
)
STRICT = "{{ raise_exception('roles must alternate') }}"
TEMPLATES = dict(plain=None, qwen3=QWEN3, r1=R1, llama3=LLAMA3, gemma=GEMMA)
TAGS = ['<|im_start|>', '<|im_end|>', '<|end_of_sentence|>', '<|eot_id|>', '<end_of_turn>']


def byte_tokenizer(bos=False, eos=False, merges=True, template=None):
    "Byte-level BPE of 320 entries, optionally with <bos> and <eos>; with `merges` it joins '?' and the next line end."
    tok = Tokenizer(models.BPE())
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not merges)
    tok.pre_tokenizer, tok.decoder = split, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=['<pad>', '<bos>', '<eos>', *TAGS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(['?\n'] * 9 + ['\n4', '42', 'two', ' two', ' plus', ' four'] * 5, trainer)
    ends = [('<bos>', 1)] * bos + [('<eos>', 2)] * eos
    if ends:
        tok.post_processor = processors.TemplateProcessing(
            single=' '.join(['<bos>'] * bos + ['$A'] + ['<eos>'] * eos), special_tokens=ends
        )
    out = PreTrainedTokenizerFast(
        tokenizer_object=tok, pad_token='<pad>', bos_token='<bos>' if bos else None, eos_token='<eos>'
    )
    if template:
        out.chat_template = template
    out.name_or_path = '/somewhere/lab-chat'
    return out


def spelt(tok, e):
    return tok.decode([e.input_ids[i] for i in e.answer])


@pytest.mark.parametrize('name', ['qwen3', 'r1', 'llama3', 'gemma'])
@pytest.mark.parametrize('answer', ['42', ' 42', 'e', 'd', 'of', 'i', 'assistant', 'user', 'two\n\nlines', '<b>'])
def test_the_answer_alone_counts_in_every_template(name, answer):
    tok = byte_tokenizer(merges=False, template=TEMPLATES[name])
    before, counted, rest = render(Item('21+21?', answer), tok, chat=True)
    assert counted == (answer.strip() if name in ('llama3', 'gemma') else answer)
    want = tok.apply_chat_template(
        [dict(role='user', content='21+21?'), dict(role='assistant', content=answer)], tokenize=False
    )
    assert before + counted + rest == want
    (e,) = encode([Item('21+21?', answer)], tok, chat=True)
    assert spelt(tok, e) == counted == e.text
    assert e.input_ids == tok(want, add_special_tokens=False)['input_ids']


def test_an_empty_think_block_belongs_to_the_prompt():
    before, _, rest = render(Item('21+21?', '42'), byte_tokenizer(template=QWEN3), chat=True)
    assert before.endswith('<think>\n\n</think>\n\n')
    assert rest == '<|im_end|>\n'


@pytest.mark.parametrize(
    'name, end',
    [('qwen3', '<|im_end|>'), ('r1', '<|end_of_sentence|>'), ('llama3', '<|eot_id|>'), ('gemma', '<end_of_turn>')],
)
def test_the_token_that_ends_the_turn_counts_when_asked(name, end):
    tok = byte_tokenizer(template=TEMPLATES[name])
    without, with_end = (encode([Item('a?', 'b')], tok, chat=True, eos=o)[0] for o in (False, True))
    assert without.input_ids == with_end.input_ids
    assert [tok.convert_ids_to_tokens(with_end.input_ids[i]) for i in with_end.answer[len(without.answer) :]] == [end]


@pytest.mark.parametrize(
    'template, item, words',
    [
        (
            R1,
            Item('21+21?', '<think>\nadd\n</think>\n\n42', id='mine.jsonl:7'),
            r'item mine.jsonl:7 of ability sums: the chat template of lab-chat changes the answer',
        ),
        (
            R1,
            Item('21+21?', '<think>42</think>'),
            'item 0 of ability sums: the chat template of lab-chat changes the answer',
        ),
        (ANSWER_PARTS, Item('a', 'b'), 'of lab-chat drops the answer'),
        (PARTS, Item('a', 'b'), 'of lab-chat drops the answer'),
        (
            "{% for m in messages %}{{ m.content if m.role == 'assistant' }}{% endfor %}",
            Item('abc', 'b'),
            'drops or changes the prompt',
        ),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", Item('abc', 'b'), 'repeats the answer'),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", Item('abc', 'b'), 'drops the answer'),
        (STRICT, Item('abc', 'b'), r'fails \(roles must alternate\)'),
        ("{{ messages[0].content.nothing.here }}", Item('abc', 'b'), 'fails'),
        ("{% if %}", Item('abc', 'b'), 'fails'),
    ],
)
def test_a_template_that_does_not_keep_the_answer_is_named(template, item, words):
    tok = byte_tokenizer(template=template)
    with pytest.raises(ActError, match=words) as e:
        encode(Ability('sums', [item]), tok, chat=True)
    assert 'leave chat off' in str(e.value)
    assert '/somewhere' not in str(e.value)


def test_a_prompt_that_holds_the_sentinel():
    tok = byte_tokenizer(template=QWEN3)
    word = 'qxzjvkw'
    assert render(Item(word, word), tok, chat=True)[1] == word


@pytest.mark.parametrize('bos', [False, True])
@pytest.mark.parametrize('chat', [False, True])
def test_what_a_tokenizer_appends_is_left_out_unless_asked_for(bos, chat):
    tok, plain = (byte_tokenizer(bos, eos, template=LLAMA3) for eos in (True, False))
    items = [Item('two plus?', ' four'), Item('x', 'y')]
    for eos in (False, True):
        assert encode(items, tok, chat=chat, eos=eos) == encode(items, plain, chat=chat, eos=eos)
    assert encode_prompts(items, tok, chat=chat) == encode_prompts(items, plain, chat=chat)
    if not chat:
        e = encode(items, tok, eos=True)[1]
        assert e.input_ids[-1] == tok.eos_token_id
        assert e.input_ids[-2] != tok.eos_token_id
        assert e.answer[-1] == len(e.input_ids) - 1
        assert (encode(items, tok)[0].input_ids[0] == tok.bos_token_id) == bos


def test_a_merge_across_the_border_is_the_answers():
    tok = byte_tokenizer()
    assert spelt(tok, encode([Item('two plus two?', '\n4')], tok)[0]) == '?\n4'
    assert spelt(tok, encode([Item('two plus two?\n', '4')], tok)[0]) == '4'


@pytest.mark.parametrize('prompt', ['', ' ', '\n'])
def test_blank_prompts(prompt):
    item = Item(prompt, 'drum', id='x:1')
    tok = byte_tokenizer(bos=True, merges=False)
    (e,) = encode([item], tok)
    assert spelt(tok, e) == 'drum'
    assert e.input_ids[0] == 1
    assert encode_prompts([item], tok)[0].input_ids == e.input_ids[: e.answer[0]]
    bare = byte_tokenizer(merges=False)
    if prompt:
        assert spelt(bare, encode([item], bare)[0]) == 'drum'
    else:
        with pytest.raises(ActError, match='item x:1: its answer begins at the first token.*give it a prompt'):
            encode([item], bare)
        with pytest.raises(ActError, match='item x:1: its prompt is empty'):
            encode_prompts([item], bare)


def test_a_first_token_that_merges_with_the_answer_is_refused():
    tok = byte_tokenizer()
    assert len(tok('?\n')['input_ids']) == 1
    with pytest.raises(ActError, match='item 0: its answer begins at the first token'):
        encode([Item('?', '\n')], tok)


def test_a_lone_space_whose_span_is_trimmed_still_counts():
    "Llama 3 trims spaces from the spans of tokens: the space before a digit is a token of its own, with an empty span."
    tok = byte_tokenizer(merges=False)
    tok.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tok.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    assert any(a == b for a, b in tok('=: 42', return_offsets_mapping=True)['offset_mapping'])
    for item in (Item('=:', ' 42'), Item('=: ', '42'), Item('=:', ' 4 ')):
        assert spelt(tok, encode([item], tok)[0]) == item.answer


@pytest.mark.parametrize('bos', [False, True])
def test_cut_on_the_left_keeps_the_answer(bos):
    tok = byte_tokenizer(bos, merges=False)
    (whole,) = encode([Item('abcdefgh', 'xyz')], tok)
    (e,) = encode([Item('abcdefgh', 'xyz')], tok, max_length=6, cut='left')
    assert len(e.input_ids) == 6
    assert spelt(tok, e) == 'xyz'
    assert e.input_ids[-5 if bos else -6 :] == whole.input_ids[-5 if bos else -6 :]
    assert (e.input_ids[0] == tok.bos_token_id) == bos
    assert encode([Item('abcdefgh', 'xyz')], tok, max_length=4, cut='left')[0].answer == [
        1,
        2,
        3,
    ]  # one token before it, the <bos> where there is one
    with pytest.raises(ActError, match='item long: its answer takes 3 tokens .* into 3: raise max_length'):
        encode([Item('abc', 'xyz', id='long')], tok, max_length=3, cut='left')
    with pytest.raises(ActError, match="'right' or 'left'"):
        encode([Item('a', 'b')], tok, cut='middle')


def test_what_a_model_cannot_read_is_named():
    e = [EncodedItem([1, 7], [1], [1], 'x', 'item 3 of ability sums')]
    check_fits(e, 8, 2, 'm')
    check_fits(e, None, None, 'm')
    with pytest.raises(
        ActError,
        match=(
            "item 3 of ability sums: token id 7 is outside the model's vocabulary of 7 .m.: use the model's own"
            " tokenizer"
        ),
    ):
        check_fits(e, 7, None, 'm')
    with pytest.raises(
        ActError,
        match='item 3 of ability sums is 2 tokens long and m reads 1: its answer alone is too long, leave it out',
    ):
        check_fits(e, None, 1, 'm')
    with pytest.raises(ActError, match='item 3 is 3 tokens long and m reads 2: pass max_length=2, which cuts it'):
        check_fits([EncodedItem([1, 2, 3], [2], [2], 'x', 'item 3')], None, 2, 'm')


@pytest.mark.parametrize(
    'config, want',
    [
        (dict(vocab_size=9, max_position_embeddings=64), (9, 64)),
        (dict(n_positions=32, vocab_size=9), (9, 32)),
        ({}, (None, None)),
        (dict(text_config=dict(vocab_size=5, max_position_embeddings=16)), (5, 16)),
        (dict(vocab_size=9, max_position_embeddings=64, rope_scaling=dict(rope_type='linear', factor=4.0)), (9, 256)),
        (
            dict(
                vocab_size=9,
                max_position_embeddings=64,
                rope_scaling=dict(rope_type='yarn', factor=4.0, original_max_position_embeddings=64),
            ),
            (9, 256),
        ),
        (
            dict(
                vocab_size=9,
                max_position_embeddings=128,
                rope_scaling=dict(rope_type='llama3', factor=8.0, original_max_position_embeddings=8),
            ),
            (9, 128),
        ),
    ],
)
def test_what_a_configuration_says(config, want):
    assert reads(type('M', (), dict(config=config))) == want


@pytest.fixture(scope='module')
def model():
    "A random model of 320 entries that reads 8,192 tokens."
    config = tiny_config('llama3')
    config.vocab_size, config.max_position_embeddings = 320, 8192
    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return net


def by_hand(model, tok, ability, **kw):
    "Log-likelihoods by plain forward passes in float32, one text at a time, without padding."
    sums = []
    for e in encode(ability, tok, **kw):
        with torch.no_grad():
            logp = model(torch.tensor([e.input_ids])).logits[0].float().log_softmax(-1)
        sums.append(sum(logp[i - 1, e.input_ids[i]].item() for i in e.answer))
    return sums


def far(model, tok, ability, batch_size=64, **kw):
    "How far what `evaluate` reports is from that, at most."
    got = evaluate(model, ability, tok, batch_size, progress=False, **kw).items
    eos = kw.pop('eos', ability.eos)
    assert got.tokens.tolist() == [len(e.answer) for e in encode(ability, tok, eos=eos, **kw)]
    return max(abs(a - b) for a, b in zip(got.loglik, by_hand(model, tok, ability, eos=eos, **kw), strict=True))


TOKENIZERS = dict(
    none={}, bos=dict(bos=True), eos=dict(eos=True), both=dict(bos=True, eos=True), apart=dict(merges=False)
)
SPECS = (
    'gsm8k/en',
    'mgsm/es',
    'mgsm/te',
    'xquad/es',
    'xquad-text/ru',
    'exams/es',
    'exams-science/es',
    'msvamp/sw',
    'arc/es',
    'arc-easy/en',
    'sciq/en',
    'sciq-text/en',
    'piqa/en',
    'openbookqa/en',
)


@pytest.fixture
def rows(tmp_path, monkeypatch):
    "Made-up files in the rows of every source."

    def put(name, lines):
        f = tmp_path / name
        f.parent.mkdir(parents=True, exist_ok=True)
        f.write_text(''.join(json.dumps(o, ensure_ascii=False) + '\n' for o in lines), encoding='utf-8')

    n = range(90)
    put(
        'gsm8k/test.jsonl',
        [dict(question=f'How many are {i} and 2?', answer=f'It is <<{i}+2={i + 2}>>{i + 2}.\n#### {i + 2}') for i in n],
    )
    for lang, q in (('es', '¿Cuánto es {} y 2?'), ('te', '{} మరియు 2 ఎంత?')):
        put(f'mgsm/{lang}.jsonl', [dict(question=q.format(i), answer=str(i + 2)) for i in n])
    for lang in ('es', 'ru'):
        put(
            f'xquad/{lang}.jsonl',
            [
                dict(
                    context=f'\ufeffUn párrafo ({i}) con algunas palabras dentro. ',
                    question='¿Qué número?',
                    answers=[str(i)],
                )
                for i in n
            ],
        )
    put(
        'exams/test.jsonl',
        [
            dict(
                id=str(i),
                lang='Spanish',
                subject='Biology',
                question=f'¿Cuál es {i}?',
                choices=[f'{i}', 'otro', 'ninguno de estos'],
                labels=list('ABC'),
                answer='A',
            )
            for i in n
        ],
    )
    put('msvamp/sw.jsonl', [dict(m_query=f'{i} na 2 ni ngapi? ', response=f'{i + 2}.0') for i in n])
    put(
        'arc/es/test.jsonl',
        [dict(id=str(i), instruction=f'¿Cuál es {i}?', option_a=str(i), option_b='otro', answer='A') for i in n],
    )
    for name, question in (('arc-easy', 'question'), ('openbookqa', 'question_stem')):
        asked = [
            {question: f'Which is {i}?', 'choices': ['none', str(i)], 'labels': list('AB'), 'answer': 'B'} for i in n
        ]
        put(f'{name}/validation.jsonl', asked)
    wrong = {f'distractor{k}': f'not {k}' for k in (1, 2, 3)}
    support = dict(support='A passage of a textbook, with the answer in it.')
    put(
        'sciq/validation.jsonl', [dict(question=f'Which is {i}?', correct_answer=str(i), **wrong, **support) for i in n]
    )
    put('piqa/validation.jsonl', [dict(goal=f'Make {i}', sol1='wait', sol2=f'add {i}', label=1) for i in n])
    monkeypatch.setenv('ACT_DATA', str(tmp_path))
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')


def test_every_source_has_its_rows_here():
    assert {s.split('/')[0] for s in SPECS} == set(SOURCES)


@pytest.mark.parametrize('kind', list(TOKENIZERS))
@pytest.mark.parametrize('spec', SPECS)
def test_every_source_is_scored_as_encode_says(rows, model, spec, kind):
    assert far(model, byte_tokenizer(**TOKENIZERS[kind]), load_ability(spec, n=3)) < 1e-4


@pytest.mark.skipif('ACT_DATA' not in os.environ, reason='no folder of data is named by ACT_DATA')
@pytest.mark.parametrize('spec', SPECS)
def test_the_sources_themselves_are_scored_as_encode_says(model, spec, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    try:
        ability = load_ability(spec, n=3)
    except ActError as e:
        pytest.skip(str(e))
    assert far(model, byte_tokenizer(bos=True, eos=True), ability) < 1e-4


ITEMS = [
    Item(f'what is {i} plus {i}{end}', f'{lead}{2 * i}')
    for i in range(3)
    for end, lead in (('?', ''), ('?', ' '), ('? ', ''), ('?\n', ''), ('?\n\n', ''), ('?', '\n'))
]


@pytest.mark.parametrize('kind', list(TOKENIZERS))
@pytest.mark.parametrize('eos', [False, True])
def test_whitespace_and_ends_are_scored_as_encode_says(model, kind, eos):
    assert far(model, byte_tokenizer(**TOKENIZERS[kind]), Ability('sums-en', ITEMS), eos=eos) < 1e-4


@pytest.mark.parametrize('name', ['qwen3', 'r1', 'llama3', 'gemma'])
@pytest.mark.parametrize('eos', [False, True])
def test_chat_is_scored_as_encode_says(model, name, eos):
    tok = byte_tokenizer(bos=True, template=TEMPLATES[name])
    ability = Ability('sums-en', [*ITEMS, Item('long ', ' a longer answer\n of two lines ')])
    assert far(model, tok, ability, chat=True, eos=eos) < 1e-4
    got = evaluate(model, ability, tok, chat=True, eos=eos, progress=False).items
    assert got.bytes.tolist() == [
        len((o.answer.strip() if name in ('llama3', 'gemma') else o.answer).encode()) for o in ability
    ]


def test_choices_in_chat_are_scored_one_by_one(model):
    tok, item = byte_tokenizer(template=GEMMA), Item('pick', ' b', choices=(' a', ' b', ' c c'))
    got = evaluate(model, Ability('pick-en', [item]), tok, chat=True, progress=False).items.iloc[0]
    each = by_hand(model, tok, [Item('pick', c) for c in item.choices], chat=True)
    assert got.loglik == pytest.approx(each[1], abs=1e-4)
    assert got.correct == (max(each) == each[1])


def test_a_prompt_that_is_cut_keeps_its_answer(model):
    tok, ability = byte_tokenizer(bos=True), Ability('sums-en', ITEMS)
    whole, short = (evaluate(model, ability, tok, max_length=n, progress=False).items for n in (None, 8))
    assert short.tokens.tolist() == whole.tokens.tolist()
    assert short.loglik.tolist() != whole.loglik.tolist()
    assert short.loglik.tolist() == pytest.approx(by_hand(model, tok, ability, max_length=8, cut='left'), abs=1e-4)
    with pytest.raises(ActError, match='does not fit'):
        evaluate(model, ability, tok, max_length=2, progress=False)


@pytest.mark.parametrize('batch_size', [1, 3, 64])
def test_the_size_of_a_batch_changes_nothing(model, batch_size):
    assert far(model, byte_tokenizer(bos=True), Ability('sums-en', ITEMS), batch_size=batch_size) < 1e-4


def test_likelihoods_of_half_precision_weights_come_in_fine_steps(model):
    "A softmax in bfloat16 would give multiples of a half, or of a sixteenth."
    got = evaluate(
        copy.deepcopy(model).bfloat16(), Ability('sums-en', ITEMS), byte_tokenizer(), progress=False
    ).items.loglik
    assert sum(abs(16 * x - round(16 * x)) > 1e-3 for x in got) > len(got) / 2


def test_what_a_model_cannot_read_is_said_before_it_runs(model, tmp_path, checkpoint):
    tok = byte_tokenizer()
    tok.add_tokens([*(f'<{i}>' for i in range(320 - len(tok))), '<new>'])
    with pytest.raises(ActError, match='item 1 of ability x: token id 320 is outside'):
        evaluate(model, Ability('x', [Item('a', 'b'), Item('a <new>', 'b')]), tok, progress=False)
    folder = checkpoint('small')
    with pytest.raises(
        ActError,
        match=(
            r'item long.jsonl:1 of ability long is 4\d\d tokens long and .*small reads 256: its answer alone is too'
            r' long'
        ),
    ):
        act_evaluate(
            model=str(folder), ability=str(Ability('long', [Item('x', 'qzj' * 150)]).save(tmp_path / 'long.jsonl'))
        )


def test_a_text_by_itself_in_windows(model):
    "lm-eval's rolling likelihood: every token once, the first after <bos>."
    tok, text = byte_tokenizer(bos=True), 'two plus two is four, ' * 3
    ids = tok(text)['input_ids']
    rolled = lambda **kw: ActLM(model, tok, progress=False, **kw).loglikelihood_rolling(
        [Instance('loglikelihood_rolling', {}, (text,), 0, ('x', 0, 1))]
    )[0]
    with torch.no_grad():
        logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert rolled() == pytest.approx(sum(logp[i - 1, t].item() for i, t in enumerate(ids) if i), abs=1e-3)

    def window(before, new):
        with torch.no_grad():
            out = model(torch.tensor([before])).logits[0].log_softmax(-1)
        return sum(out[len(before) - len(new) + k, t].item() for k, t in enumerate(new))

    body = ids[1:]
    ends = [*range(9, len(body), 9), len(body)]
    parts = [window(ids[:9], body[:9]), *(window(body[b - 10 : b - 1], body[a:b]) for a, b in zip(ends, ends[1:]))]
    assert rolled(max_length=10) == pytest.approx(sum(parts), abs=1e-3)


def greedy(model, ids, n, ends):
    "One token at a time, no cache, no padding."
    out = []
    while len(out) < n:
        with torch.no_grad():
            t = model(torch.tensor([ids + out])).logits[0, -1].argmax().item()
        if t in ends:
            break
        out.append(t)
    return out


@pytest.mark.parametrize('chat', [False, True])
def test_what_is_written_is_greedy_and_kept(model, chat):
    tok = byte_tokenizer(bos=True, eos=True, template=QWEN3)
    model.generation_config.repetition_penalty, model.generation_config.eos_token_id = 1.8, [2]
    ability = Ability('sums-en', [Item('two plus two is ', '4'), Item('x', '7'), Item('what is it, ' * 4, '1')])
    r = evaluate(model, ability, tok, generate=6, chat=chat, progress=False)
    ids = [greedy(model, e.input_ids, 6, {2}) for e in encode_prompts(ability, tok, chat=chat)]
    texts = [tok.decode(i) for i in ids]
    assert r.items.text.tolist() == texts
    assert r.items.limit.tolist() == [len(i) == 6 for i in ids]
    assert r.items.read.tolist() == [read_number(t, 'en', True) for t in texts]


def test_stop_strings_end_a_text(model):
    tok = byte_tokenizer()
    free = ActLM(model, tok, progress=False)
    ask = lambda **how: free.generate_until([Instance('generate_until', {}, ('two plus', how), 0, ('x', 0, 1))])[0]
    whole = ask(max_gen_toks=12)
    stop = whole[4:6]
    assert len(whole) > 8
    assert free.at_limit['x', 0]
    assert ask(max_gen_toks=12, until=[stop]) == whole[: whole.index(stop)]
    assert not free.at_limit['x', 0]
    assert ask(max_gen_toks=12, until=stop) == whole[: whole.index(stop)]
    with pytest.raises(ActError, match='writes greedily'):
        ask(do_sample=True)


def test_never_more_is_written_than_fits(model):
    tok, seen = byte_tokenizer(merges=False), []
    hook = model.model.embed_tokens.register_forward_hook(lambda m, a, o: seen.append(a[0].shape[1]))
    lm = ActLM(model, tok, max_length=20, progress=False)
    ask = lambda prompt, n: lm.generate_until(
        [Instance('generate_until', {}, (prompt, dict(max_gen_toks=n)), 0, ('x', 0, 1))]
    )[0]
    ask('q' * 15, 8)
    assert seen[0] + len(seen) - 1 <= 20  # the prompt, cut to 12, and 8 tokens
    seen.clear()
    ask('q' * 15, 4)
    assert seen[0] == 15
    assert len(seen) <= 4
    hook.remove()


def test_results_with_and_without_texts_come_back(model, tmp_path):
    tok = byte_tokenizer()
    pick, sums = (
        Ability('pick-en', [Item('pick', ' b', choices=(' a', ' b'))]),
        Ability('sums-en', [Item('two plus', ' 4')]),
    )
    r = evaluate(model, [pick, sums], tok, generate=4, progress=False)
    again = EvalResult.load(r.save(tmp_path / 'r.json'))
    assert again.items.text.tolist() == r.items.text.tolist() == [None, r.items.text[1]]
    assert again.items.limit.tolist() == r.items.limit.tolist()
    assert again.items.read.tolist() == r.items.read.tolist()
    scored = evaluate(model, pick, tok, progress=False)
    assert not {'text', 'read', 'limit'} & set(scored.items)
    assert not {'text', 'read', 'limit'} & json.loads(scored.save(tmp_path / 's.json').read_text())['items'].keys()
    assert not {'text', 'read', 'limit'} & set(EvalResult.load(tmp_path / 's.json').items)
