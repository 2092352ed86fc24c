"A folder of a study whose rows nobody measured, and how to look at its page"
from html.parser import HTMLParser
from pathlib import Path
import adverfine.study.presets  # noqa: F401 Study.quick
from adverfine.study.folder import CellFiles, StudyFolder
from adverfine.study.rows import said_of
from adverfine.study.study import Study

evil = '</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1><b onclick=x>"\'&amp;$x'

def fabricate(path, change=None, robust=0., **kwargs):
    "Write it to `path`; `change` edits a row"
    options = dict(levels=(.5, .9), bits=(8, (1, 8), 1), joint=((.5, (4, 8)),), parents=('standard', 'adversarial'),
                   n_train=100, n_test=50)
    study = Study.quick('digits', out=path, bf16=False, **options | kwargs)
    folder = StudyFolder(path)
    folder.claim(study.protocol(study.images()))
    folder.plan(study.cells())
    verdicts = ['trusted', 'not converged', 'trusted', 'gradient masking']
    for k,cell in enumerate(study.cells()):
        row = dict(clean=.9-.01*(k%7), robust=.5-.012*k+robust, n=50, macs=10**6-10**4*(k%9), latency_ms=2.+k%5,
                   bytes=4*10**6-10**5*(k%11), training_seconds=0. if cell.tuning.how=='none' else 3.+k,
                   verdict=verdicts[k%4], reasons=f'guard: reason {k}' if k%2 else '')
        row = said_of(cell, study.judge) | row
        CellFiles(folder.path/'cells').keep(cell, row | (change(k, row) if change else {}))
    return Path(path)

def until(tab, what):
    "Wait; the policy of the page forbids the way in which Playwright would"
    for _ in range(200):
        if tab.evaluate(what): return
        tab.wait_for_timeout(50)
    raise AssertionError(f'never: {what}')

class Words(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.text = ''
        self.feed(text)
    def handle_data(self, data): self.text += data
