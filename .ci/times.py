"Run every notebook, one after the other, and write what each took to act/results/notebook-times.json."
import os, sys, time
from pathlib import Path
os.environ.update(TQDM_DISABLE='1', OMP_NUM_THREADS='1')
from nbdev.test import test_nb
from act.core import PACKAGE, provenance, write_json

root = Path(__file__).parent.parent
seconds = {}
for nb in sorted((root/'nbs').glob('*.ipynb')):
    start = time.time()
    ok, _ = test_nb(nb, skip_flags=['slow', 'gpu'], do_print=True)
    if not ok: sys.exit(f'{nb.name} failed')
    seconds[nb.stem] = round(time.time() - start, 1)
write_json(provenance(seconds=seconds), PACKAGE/'results'/'notebook-times.json')
