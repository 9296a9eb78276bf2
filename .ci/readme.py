"Write README.md from nbs/index.ipynb and nbs/llms.txt from all notebooks, without Quarto: `readme.py` writes them, `readme.py --check` fails when they are out of step."

import base64, configparser, json, re, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIGURES = 'nbs/images'


def _output(out, name, alt):
    "One cell output as Markdown; pictures go to files."
    data = out.get('data', {})
    text = lambda k: ''.join(data[k])
    if 'image/png' in data:
        path = f'{FIGURES}/{name}.png'
        return f"![{alt or name.replace('-', ' ')}]({path})", {path: base64.b64decode(text('image/png'))}
    if 'text/markdown' in data:
        return text('text/markdown'), {}
    if 'text/html' in data and 'text/plain' not in data:
        return text('text/html'), {}
    body = text('text/plain') if 'text/plain' in data else ''.join(out.get('text', ''))
    return '```\n' + body.rstrip() + '\n```', {}


def readme(nb):
    "Markdown of the notebook `nb` and the picture files that it needs."
    parts, files = [], {}
    for i, cell in enumerate(nb['cells']):
        src = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown':
            parts.append(re.sub(r'(\]\(|<img src=")(\w+\.ipynb|images/)', r'\1nbs/\2', src))
            continue
        if re.search(r'^#\| *hide *$', src, re.M):
            continue
        label = re.search(r'^#\| *label: *(?:fig|tbl)-(\S+)', src, re.M)
        code = re.sub(r'^#\|.*\n?', '', src, flags=re.M).strip()
        if code and not re.search(r'^#\| *echo: *false', src, re.M):
            parts.append(f'```python\n{code}\n```')
        for out in cell.get('outputs', []):
            alt = re.search(r'^#\| *fig-alt: *"(.*)"', src, re.M)
            md, new = _output(out, label[1] if label else f'figure-{i}', alt and alt[1])
            parts.append(md)
            files.update(new)
    return '\n\n'.join(parts) + '\n', files


def llms():
    "An index of the site for programs that read (llmstxt.org): a line a page, by section of the sidebar."
    import yaml

    cfg = configparser.ConfigParser(delimiters=['='])
    cfg.read(ROOT / 'settings.ini', encoding='utf-8')
    cfg = cfg['DEFAULT']

    def entry(page):
        title, blurb = re.match(
            r'# (.*?)\n\n> (.*)',
            ''.join(json.loads((ROOT / 'nbs' / page).read_text(encoding='utf-8'))['cells'][0]['source']),
            re.S,
        ).groups()
        return (
            title,
            (
                f"- [{title}]({cfg['doc_host']}{cfg['doc_baseurl']}/{re.sub(r'^[0-9]+_', '', page).replace('.ipynb', '.html')}):"
                f" {blurb}"
            ),
        )

    contents = yaml.safe_load((ROOT / 'nbs/sidebar.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']
    parts = [
        f"# {entry('index.ipynb')[0]}",
        f"> {cfg['description']}",
        (
            f"Source: {cfg['git_url']}. Every page is a notebook, and `act/` is made from them. The paper: arXiv"
            " 2601.09398."
        ),
    ]
    parts.append('\n'.join(['## Start', *(entry(o)[1] for o in contents if isinstance(o, str))]))
    parts += [
        '\n'.join([f"## {o['section']}", *(entry(p)[1] for p in o['contents'])])
        for o in contents
        if isinstance(o, dict)
    ]
    return '\n\n'.join(parts) + '\n'


if __name__ == '__main__':
    md, files = readme(json.loads((ROOT / 'nbs/index.ipynb').read_text(encoding='utf-8')))
    wanted = {'README.md': md.encode(), 'nbs/llms.txt': llms().encode(), **files}
    if '--check' in sys.argv:
        stale = [p for p, b in wanted.items() if not (ROOT / p).exists() or (ROOT / p).read_bytes() != b]
        if stale:
            sys.exit(f"out of step with nbs/: {', '.join(stale)}: run make readme")
    else:
        for p, b in wanted.items():
            (ROOT / p).parent.mkdir(parents=True, exist_ok=True)
            (ROOT / p).write_bytes(b)
