"The picture of the home page and the reference: drawn and listed from what is there."

import base64, contextlib, importlib, inspect, io, json, re, sys
import numpy as np, pytest, torch
from pathlib import Path
from types import FunctionType, SimpleNamespace
from xml.etree import ElementTree
from act.abilities import Ability, Item
from act.encoding import batches, encode
from act.channels import enumerate_channels
from act.kit.errors import ActError
from act.masks import ChannelMask
from act.scores import ChannelScores
from act.studies.picture import activity, brightness, pixels, story
from act.tools.reference import called, pages, reference, run_this
from conftest import tiny_model

ITEMS = Ability('sums', [Item(f'{i} and {i}', f' {2 * i}') for i in range(6)])


def test_activity_is_the_mean_over_answer_tokens(tokenizer, family):
    model, seen, n = tiny_model(family), {}, 0
    a = activity(model, ITEMS, tokenizer)
    for b in batches(encode(ITEMS, tokenizer), tokenizer):
        hooks = [
            m.register_forward_hook(lambda _, i, o, p=p: seen.setdefault(p, []).append((o, b['positions'])))
            for p, m in model.named_modules()
            if p in a.map
        ]
        with torch.no_grad():
            model(**{k: b[k] for k in ('input_ids', 'attention_mask', 'position_ids')})
        for h in hooks:
            h.remove()
        n += int(b['positions'].sum())
    for p, runs in seen.items():
        if runs[0][0].ndim == 3:
            torch.testing.assert_close(a[p], sum(o[at].abs().sum(0) for o, at in runs) / n)
    assert a.meta['tokens'] == n
    assert set(seen) == set(a.map.paths)


def test_a_pixel_is_a_channel():
    from PIL import Image

    v = np.linspace(0, 1, 10)
    px = np.asarray(Image.open(io.BytesIO(base64.b64decode(pixels(v, (1, 2, 3), 4).split(',')[1]))))
    opacity = px.reshape(-1, 4)[:, 3]
    assert px.shape == (3, 4, 4)
    assert (opacity[:10] == np.round(255 * v)).all()
    assert not opacity[10:].any()
    assert (px[..., :3] == (1, 2, 3)).all()


WORDS = dict(target='a < b', donor='d', scores='s', retained='kept', recovered='back', steps=('1 & 2', 'x', 'y', 'z'))


def test_the_story_is_well_formed_and_says_what_it_is_given():
    cm = enumerate_channels(tiny_model())
    s = ChannelScores({m.path: torch.rand(m.width) for m in cm}, cm)
    mask = ChannelMask({m.path: torch.rand(m.width) > 0.5 for m in cm}, cm)
    svg = story(s, s, s, mask, {'one': (1.0, 0.25), 'two': (0.5, 0.75)}, WORDS, 'a "quoted" <sentence>')
    root = ElementTree.fromstring(svg)
    text = ''.join(root.itertext())
    for words in ('a < b', '1 & 2', '100 %', '25 %', '50 %', '75 %', 'two'):
        assert words in text
    assert root.get('aria-label') == 'a "quoted" <sentence>'
    assert root.get('role') == 'img'
    assert 'prefers-reduced-motion' in svg
    assert 'infinite' not in svg  # it comes to rest
    other = enumerate_channels(tiny_model('llama2'))
    with pytest.raises(ActError, match='same channels'):
        story(s, s, s, ChannelMask({m.path: torch.zeros(m.width) for m in other}, other), {}, WORDS, '')


def test_the_highest_are_bright_and_what_is_below_zero_is_dark():
    cm = enumerate_channels(tiny_model())
    shown = brightness(ChannelScores.from_flat(torch.linspace(-1, 1, cm.total), cm))
    assert (shown[: cm.total // 2] == 0).all()
    assert (shown[-max(1, cm.total // 60) :] == 1).all()
    assert (np.diff(shown) >= 0).all()


def public():
    "(module, object) for every public function and class that is no command."
    for name in pages():
        module = importlib.import_module(f'act.{name}')
        for n in module.__all__:
            if not n.startswith('act_') and isinstance(getattr(module, n), (type, FunctionType)):
                yield name, getattr(module, n)


def test_every_public_name_stands_in_the_reference():
    text = reference()
    for module, o in public():
        assert f'- [`{o.__name__}`](' in text, f'{module}.{o.__name__}'


def test_no_signature_names_a_folder_of_this_machine():
    shown = []
    for module, o in public():
        with contextlib.suppress(TypeError, ValueError):  # has no signature
            defaults = [p.default for p in inspect.signature(o).parameters.values()]
            shown += [f'{module}.{o.__name__}' for d in defaults if isinstance(d, Path) and d.is_absolute()]
    assert not shown, 'give None and look the path up: the site prints defaults'


def test_an_entry_is_a_line_of_a_list():
    lines = [l for l in reference().split('\n') if l and not l.startswith('#')]
    assert all(l.startswith('- [`') or 'Built in [' in l for l in lines)


def test_rooms_come_one_after_the_other():
    rooms = [l[3:] for l in reference().split('\n') if l.startswith('## ')]
    assert rooms[:3] == ['Kit', 'Show', 'The tool']
    assert len(rooms) == len(set(rooms))


def test_the_page_lists_what_the_library_has():
    "Run nbs/92_reference.ipynb again when this fails."
    cells = json.loads(Path('nbs/92_reference.ipynb').read_text())['cells']
    shown = [''.join(o.get('data', {}).get('text/markdown', '')) for c in cells for o in c.get('outputs', [])]
    listed = re.findall(r'^- \[`(\w+)`\]\(', max(shown, key=len), re.M)
    assert sorted(listed) == sorted(o.__name__ for _, o in public())


def test_a_module_that_does_not_exist():
    with pytest.raises(ActError, match='no module act.nothing'):
        reference('nothing')


def test_how_something_is_called():
    def f(a, *rest, b=1, c={'x': 'a very long default value indeed'}, **more):
        pass

    assert called(f) == 'f(a, *rest, b=1, c=..., **more)'


def test_links_for_running_a_page_come_after_the_title():
    nb = SimpleNamespace(path_='/somewhere/nbs/24_masks.ipynb', cells=['title', 'rest'])
    run_this(nb).begin()
    title, links, rest = nb.cells
    assert (title, rest) == ('title', 'rest')
    assert links.cell_type == 'markdown'
    assert 'colab.research.google.com/github/act-companion/act/blob/main/nbs/24_masks.ipynb' in links.source
    assert 'raw.githubusercontent.com' in links.source


def test_the_index_for_programs_lists_every_page():
    sys.path.insert(0, '.ci')
    try:
        from readme import llms
    finally:
        sys.path.remove('.ci')
    text = llms()
    titles = [
        ''.join(json.loads(f.read_text())['cells'][0]['source']).split('\n')[0][2:] for f in Path('nbs').glob('*.ipynb')
    ]
    assert all(f'[{t}](' in text for t in titles)
    assert text.startswith('# ACT')
    assert text.count('\n- [') == len(titles)
