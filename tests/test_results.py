"What is committed in results/ can be made again, and is what the pages say"
import json
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
    theirs = read_study(folder).protocol
    assert theirs['judge']==study.protocol(dls)['judge'] and theirs['parents']==study.protocol(dls)['parents']
    from adverfine.study.cells import Setup
    from adverfine.study.inputs import network_maker
    setup = Setup(dls, network_maker(study.network, dls), study.judge, theirs['bf16'])
    row = setup.measure(cell, *ParentFiles(folder/'parents').load(cell))
    for what in ('clean', 'robust'): assert kept[f'{what}_low']<=row[what]<=kept[f'{what}_high']
    assert (row['macs'], row['bytes'], row['n'])==(kept['macs'], kept['bytes'], kept['n'])
