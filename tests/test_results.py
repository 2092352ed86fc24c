"What is committed in results/ can be made again, and is what the pages say"
import json, re, sys
from pathlib import Path
import pandas as pd, pytest
from adverfine.study.folder import CellFiles, ParentFiles, read_study
from adverfine.study.study import Study
import adverfine.study.presets  # noqa: F401 makers of studies

results = Path(__file__).resolve().parents[1]/'results'
studies = sorted(o.parent for o in results.glob('*/study.json'))

@pytest.mark.parametrize('folder', studies, ids=lambda o: o.name)
def test_a_study_says_where_it_comes_from(folder):
    found,table = read_study(folder),pd.read_csv(folder/'results.csv')
    assert len(table)==len(found.df)
    for k in 'clean','robust','robust_low','macs','bytes': assert table[k].tolist()==pytest.approx(found.df[k].tolist())
    said = (folder/'README.md').read_text()
    assert found.runs and all(o['command'].startswith('adverfine study ') and o['device'] for o in found.runs)
    for run in found.runs: assert all(str(run[k]) in said for k in ('command', 'adverfine', 'torch', 'device'))
    for verdict in table.verdict: assert verdict in ('trusted', 'not converged', 'gradient masking')
    assert sum(o.stat().st_size for o in folder.rglob('*') if o.is_file())<20e6

def test_a_committed_cell_comes_out_again():
    "Pruned by half and left so: nothing is trained, so that other processors round little otherwise"
    folder = results/'digits'
    study = Study.quick('digits', out=folder)
    cell = next(o for o in study.cells() if o.name=='standard-seed0-prune-0.5-none')
    kept = json.loads(CellFiles(folder/'cells').file(cell).read_text())
    dls = study.images()
    theirs,here = read_study(folder).protocol,study.protocol(dls)
    assert theirs['judge']==here['judge'] and theirs['parents']==here['parents']
    from adverfine.study.cells import Setup
    from adverfine.study.inputs import network_maker
    setup = Setup(dls, network_maker(study.network, dls), study.judge, theirs['bf16'])
    row = setup.measure(cell, *ParentFiles(folder/'parents').load(cell))
    for what in ('clean', 'robust'): assert kept[f'{what}_low']<=row[what]<=kept[f'{what}_high']
    assert (row['macs'], row['bytes'], row['n'])==(kept['macs'], kept['bytes'], kept['n'])

sys.path.insert(0, str(results.parent/'tools'))
from measured import marked, with_numbers

nbs = results.parent/'nbs'
prose = sorted([*nbs.glob('*.ipynb'), *nbs.glob('[a-z]*/*.ipynb')])

def measured_numbers(text):
    "What looks like a measurement in Markdown, without code, formulas, addresses and what stands between marks"
    text = re.sub(r'```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$]+\$|\]\([^)]*\)|https?://\S+', ' ', marked.sub(' ', text),
                  flags=re.S)
    return re.findall(r'(?<![\w.])\d*\.?\d+ ?(?:%|times\b|points\b|ms\b)|(?<![\w./])0?\.\d\d+', text)

by_definition = {'95 %'}    # of intervals

@pytest.mark.parametrize('page', prose, ids=lambda o: o.stem)
def test_numbers_in_prose_have_a_source(page):
    cells = json.loads(page.read_text())['cells']
    found = [o for c in cells if c['cell_type']=='markdown' for o in measured_numbers(''.join(c['source']))]
    assert not set(found)-by_definition, 'mark them, see tools/measured.py, or let a cell print them'

def test_a_number_that_is_changed_by_hand_is_noticed():
    text = 'Robust: <!--=cell digits prune-0.5 adversarial robust-->99.9 %<!--/-->.'
    rows = pd.read_csv(results/'digits/results.csv')
    half = rows[(rows.label=='prune-0.5') & (rows.fine_tuning=='adversarial')]
    assert with_numbers(text)==text.replace('99.9', f'{100*half.robust.item():.1f}')
    assert measured_numbers('It is 2.6 times as fast, and leaves .815, or 81.5 %.')==['2.6 times', '.815', '81.5 %']
    assert not measured_numbers(text + ' eps is 8/255, `eps=.05` of [this](a.b/99 %).')
    with pytest.raises(ValueError, match='has no cell'): with_numbers(text.replace('prune-0.5', 'prune-0.55'))
