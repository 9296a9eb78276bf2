"Package metadata, all of it from settings.ini."
import configparser, re
from pathlib import Path
from setuptools import find_packages, setup

config = configparser.ConfigParser(delimiters=['='])
config.read('settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
extras = {k.removesuffix('_requirements'): cfg[k].split() for k in cfg if k.endswith('_requirements')}

def described():
    "README.md for a package index, where links and pictures must be whole addresses."
    readme = Path('README.md')
    if not readme.exists(): return ''
    docs = cfg['doc_host'] + cfg['doc_baseurl']
    raw = f"{cfg['git_url'].replace('github.com', 'raw.githubusercontent.com')}/{cfg['branch']}"
    text = re.sub(r'(\]\(|<img src=")(?=nbs/images/)', rf'\1{raw}/', readme.read_text(encoding='utf-8'))
    return re.sub(r'\]\(nbs/(?:\d+_)?(\w+)\.ipynb', rf']({docs}/\1.html', text)

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], license='Apache-2.0', url=cfg['git_url'],
    long_description=described(), long_description_content_type='text/markdown',
    packages=find_packages(include=['act', 'act.*']), include_package_data=True,
    python_requires='>=' + cfg['min_python'], install_requires=cfg['requirements'].split(), extras_require=extras,
    entry_points=dict(console_scripts=cfg['console_scripts'].split('\n'), nbdev=[f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]),
    zip_safe=False)
