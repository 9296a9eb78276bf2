"The picture of the home page and the reference: drawn and listed from what is there."

import base64, io, json, sys
import numpy as np, pytest, torch
from types import SimpleNamespace
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
    assert a.meta['tokens'] == n and set(seen) == set(a.map.paths)


def test_a_pixel_is_a_channel():
    from PIL import Image

    v = np.linspace(0, 1, 10)
    px = np.asarray(Image.open(io.BytesIO(base64.b64decode(pixels(v, (1, 2, 3), 4).split(',')[1]))))
    assert (
        px.shape == (3, 4, 4)
        and (px.reshape(-1, 4)[:10, 3] == np.round(255 * v)).all()
        and not px.reshape(-1, 4)[10:, 3].any()
        and (px[..., :3] == (1, 2, 3)).all()
    )


WORDS = dict(target='a < b', donor='d', scores='s', retained='kept', recovered='back', steps=('1 & 2', 'x', 'y', 'z'))


def test_the_story_is_well_formed_and_says_what_it_is_given():
    cm = enumerate_channels(tiny_model())
    s = ChannelScores({m.path: torch.rand(m.width) for m in cm}, cm)
    mask = ChannelMask({m.path: torch.rand(m.width) > 0.5 for m in cm}, cm)
    svg = story(s, s, s, mask, {'one': (1.0, 0.25), 'two': (0.5, 0.75)}, WORDS, 'a "quoted" <sentence>')
    root = ElementTree.fromstring(svg)
    text = ''.join(root.itertext())
    assert (
        all(o in text for o in ('a < b', '1 & 2', '100 %', '25 %', '50 %', '75 %', 'two'))
        and root.get('aria-label') == 'a "quoted" <sentence>'
        and root.get('role') == 'img'
    )
    assert 'prefers-reduced-motion' in svg and 'infinite' not in svg  # it comes to rest
    other = enumerate_channels(tiny_model('llama2'))
    with pytest.raises(ActError, match='same channels'):
        story(s, s, s, ChannelMask({m.path: torch.zeros(m.width) for m in other}, other), {}, WORDS, '')


def test_brightness_is_relative_to_the_module():
    cm = enumerate_channels(tiny_model())
    loud = ChannelScores(
        {m.path: torch.arange(1.0, m.width + 1) * (100.0 if i % 2 else 1.0) for i, m in enumerate(cm)}, cm
    )
    assert np.allclose(
        brightness(loud), brightness(ChannelScores({m.path: torch.arange(1.0, m.width + 1) for m in cm}, cm)), atol=1e-6
    )


def test_every_public_name_stands_in_the_reference():
    import importlib

    text = reference()
    for name in pages():
        m = importlib.import_module(f'act.{name}')
        for n in m.__all__:
            o = getattr(m, n)
            if (isinstance(o, type) or callable(o) and hasattr(o, '__code__')) and not n.startswith('act_'):
                assert f'[`{o.__name__}`](' in text, f'{name}.{n}'
    assert all(l.count('|') - l.count('\\|') == 4 for l in text.split('\n') if l.startswith('| '))
    with pytest.raises(ActError, match='no module act.nothing'):
        reference('nothing')


def test_how_something_is_called():
    def f(a, *rest, b=1, c={'x': 'a very long default value indeed'}, **more):
        pass

    assert called(f) == 'f(a, *rest, b=1, c=..., **more)'


def test_links_for_running_a_page_come_after_the_title():
    nb = SimpleNamespace(path_='/somewhere/nbs/24_masks.ipynb', cells=['title', 'rest'])
    run_this(nb).begin()
    assert nb.cells[0] == 'title' and nb.cells[2] == 'rest' and nb.cells[1].cell_type == 'markdown'
    assert (
        'colab.research.google.com/github/act-companion/act/blob/main/nbs/24_masks.ipynb' in nb.cells[1].source
        and 'raw.githubusercontent.com' in nb.cells[1].source
    )


def test_the_index_for_programs_lists_every_page():
    sys.path.insert(0, '.ci')
    try:
        from readme import llms
    finally:
        sys.path.remove('.ci')
    text = llms()
    from pathlib import Path

    titles = [
        ''.join(json.loads(f.read_text())['cells'][0]['source']).split('\n')[0][2:] for f in Path('nbs').glob('*.ipynb')
    ]
    assert all(f'[{t}](' in text for t in titles) and text.startswith('# ACT') and text.count('\n- [') == len(titles)
