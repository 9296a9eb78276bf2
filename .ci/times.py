"Run notebooks (all, or those named), one after the other, and note what each took in act/results/notebook-times.json."

import json, os, sys, time
from pathlib import Path

os.environ.update(TQDM_DISABLE='1', OMP_NUM_THREADS='1')
from nbdev.test import test_nb
from act.kit.errors import PACKAGE
from act.kit.records import provenance, write_json

folder, out = Path(__file__).parent.parent / 'nbs', PACKAGE / 'results' / 'notebook-times.json'
seconds = json.loads(out.read_text())['seconds'] if out.exists() and sys.argv[1:] else {}
for nb in [folder / f'{n}.ipynb' for n in sys.argv[1:]] or sorted(folder.glob('*.ipynb')):
    start = time.time()
    ok, _ = test_nb(nb, skip_flags=['slow', 'gpu'], do_print=True)
    if not ok:
        sys.exit(f'{nb.name} failed')
    seconds[nb.stem] = round(time.time() - start, 1)
write_json(provenance(seconds=dict(sorted(seconds.items()))), out)
