"A study that is killed, interrupted, extended or misused"
import json, math, os, signal, subprocess, sys, time, warnings
import pandas as pd, pytest, torch
from safetensors.torch import load_file
from adverfine.threat import ThreatModel
from adverfine.networks.zoo import cnn8
from adverfine.data.pixels import pixels
from adverfine.data.sources import digits_dls
from adverfine.evaluation.report import interval, RobustnessReport
from adverfine.study.rows import completed, judged, row_columns as columns, seeds_half_width
from adverfine.study.folder import read_study
from adverfine.study.study import Study
import adverfine.study.presets  # noqa: F401 makers of studies
from adverfine.study.tables import accuracy_table, plot_study
from adverfine.study.page import in_words, write_report

tiny = dict(levels=(.3,.6), bits=(4,), epochs=3, fine_tune_epochs=1, n_train=300, n_test=60, steps=3, train_steps=1,
            escalate=False)
options = ('--levels 0.3 0.6 --bits 4 --epochs 3 --fine-tune-epochs 1 --n-train 300 --n-test 60 --steps 3 '
           '--train-steps 1 --no-escalate').split()
env = dict(os.environ, OMP_NUM_THREADS='1')

def _cli(*args, **kw):
    command = [sys.executable, '-c', 'import sys; from adverfine.cli import main; sys.exit(main())', *map(str, args)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)

def _wait_for_cells(out, n, p):
    end = time.time()+120
    while len(list((out/'cells').glob('*.json')))<n and time.time()<end and p.poll() is None: time.sleep(.02)

def test_killed_and_resumed_gives_the_same_bytes(tmp_path):
    whole,killed = tmp_path/'whole',tmp_path/'killed'
    p = _cli('study', 'digits', '--out', whole, *options)
    _,err = p.communicate()
    assert p.returncode==0, err
    p = _cli('study', 'digits', '--out', killed, *options)
    _wait_for_cells(killed, 3, p)
    p.kill(); p.communicate()
    done = len(list((killed/'cells').glob('*.json')))
    assert 3<=done<12
    p = _cli('study', 'digits', '--out', killed, *options)
    text,_ = p.communicate()
    assert p.returncode==0 and 'report.html' in text
    timed = ['latency_ms', 'seconds', 'training_seconds']
    a,b = (pd.read_csv(o/'results.csv', dtype=str).drop(columns=timed) for o in (whole, killed))
    assert len(a)==12 and a.to_csv()==b.to_csv()
    assert len(list(killed.rglob('.*.part')))<=1     # what was being written when it was killed

def test_interrupted_says_how_to_go_on(tmp_path):
    def hear_ctrl_c(): signal.signal(signal.SIGINT, signal.SIG_DFL)  # also where the tests run in the background
    p = _cli('study', 'digits', '--out', tmp_path, *options, preexec_fn=hear_ctrl_c)
    _wait_for_cells(tmp_path, 1, p)
    p.send_signal(signal.SIGINT)
    _,err = p.communicate()
    assert p.returncode==130 and 'the same command goes on' in err and 'Traceback' not in err

def test_help_does_not_wait_for_torch():
    code = ("import sys; from adverfine.cli import main\n"
            "try: main(['study', '--help'])\n"
            "except SystemExit: pass\n"
            "assert 'torch' not in sys.modules")
    subprocess.run([sys.executable, '-c', code], check=True, capture_output=True)

def test_extended_not_repeated(tmp_path):
    Study.quick('digits', out=tmp_path, **dict(tiny, levels=(.3,), bits=())).run(progress=False)
    stamp = {f: f.stat().st_mtime_ns for f in (tmp_path/'cells').iterdir()}
    more = Study.quick('digits', out=tmp_path, **tiny)
    assert len(more.run(progress=False))==12
    assert len(stamp)==6 and all(f.stat().st_mtime_ns==t for f,t in stamp.items())
    df = pd.read_csv(tmp_path/'results.csv')
    assert list(df.columns)==columns and columns[:19]==('data seed parent compression level fine_tuning clean robust '
        'clean_ci robust_ci n attack eps params macs bytes latency_ms seconds version').split()
    always = columns[:columns.index('prune')] + 'label norm clamp attacks epochs network torch device'.split()
    assert df[always].drop(columns='reasons').notna().all().all()
    assert (df.robust<df.clean).all()                         # PGD takes something of each
    for row in df.itertuples():
        for k in ('clean', 'robust'):
            low,high = getattr(row, f'{k}_low'),getattr(row, f'{k}_high')
            assert (low,high)==pytest.approx(interval(getattr(row, k), 60)) and low<=getattr(row, k)<=high
            assert getattr(row, f'{k}_ci')==pytest.approx((high-low)/2)
        assert (row.verdict=='trusted')==isinstance(row.reasons, float) and row.split=='test' and row.passes>0
    net,test = cnn8(size=8).eval(),digits_dls(n_train=300, n_test=60).test
    net.load_state_dict(load_file(next((tmp_path/'parents').iterdir())))
    x,y = pixels(test)
    with torch.no_grad(): right = net(x*2-1).argmax(1)==y
    assert df.clean[0]==pytest.approx(right.float().mean().item())
    files = write_report(more)
    assert files and all(f.stat().st_size for f in files.values())
    for bad in (dict(eps=.2), dict(steps=4), dict(n_test=50), dict(escalate=True)):
        other = Study.quick('digits', out=tmp_path, **{**tiny, **bad})
        with pytest.raises(ValueError, match='holds another study'): other.run(progress=False)

def test_damaged_files_are_named(tmp_path):
    study = Study.quick('digits', out=tmp_path, **dict(tiny, levels=(), bits=()))
    study.run(progress=False)
    cell = next((tmp_path/'cells').iterdir())
    cell.write_text(cell.read_text()[:30])
    with pytest.raises(ValueError, match=cell.name): study.run(progress=False)
    cell.unlink()
    parent = next((tmp_path/'parents').iterdir())
    parent.write_bytes(parent.read_bytes()[:100])
    with pytest.raises(ValueError, match=parent.name): study.run(progress=False)

def test_parents_and_seeds(tmp_path):
    grid = dict(parents=('standard', 'adversarial'), seeds=(0, 1), levels=(.5,), bits=(8,),
                fine_tunings=('adversarial',))
    study = Study.quick('digits', out=tmp_path, **{**tiny, **grid})
    df = study.run(progress=False)
    assert len(df)==12 and len(list((tmp_path/'parents').iterdir()))==4
    assert '±' in accuracy_table(df).to_string()
    assert len(plot_study(df).axes)==4
    assert 'mean ± t s/√k' in in_words(read_study(study.out))

@pytest.mark.parametrize('fine_tunings', [('none',), ('standard',)])
def test_any_part_of_the_grid_can_be_drawn(tmp_path, fine_tunings):
    study = Study.quick('digits', out=tmp_path, **dict(tiny, levels=(), bits=(), fine_tunings=fine_tunings))
    study.run(progress=False)
    write_report(study)

claimer = '''
import sys
from adverfine.study.presets import Study
study = Study.quick('digits', out=sys.argv[1], seeds=(0,), eps=float(sys.argv[2]))
dls = study.images()
print(flush=True)
sys.stdin.readline()
try: study.claim(dls)
except ValueError: sys.exit(3)
'''

def test_a_folder_belongs_to_whoever_came_first(tmp_path):
    def claim(eps):
        command = [sys.executable, '-c', claimer, tmp_path/'out', eps]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    claims = [claim(o) for o in ('.1', '.2', '.3')]
    for o in claims: o.stdout.readline()
    for o in claims:
        o.stdin.write('\n')
        o.stdin.flush()
    assert sorted(o.wait() for o in claims)==[0, 3, 3]

def test_rows_of_several_versions_are_said_to_be(tmp_path):
    import adverfine
    study = Study.quick('digits', out=tmp_path, **dict(tiny, levels=(), bits=()))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        assert set(study.run(progress=False).version)=={adverfine.__version__}
    assert not [o for o in said if 'several versions' in str(o.message)]
    assert 'several versions' not in in_words(read_study(study.out))
    first,second = sorted((tmp_path/'cells').iterdir())[:2]
    row = json.loads(first.read_text())
    first.write_text(json.dumps({k: v for k,v in row.items() if k!='version'}))  # as it was once written
    second.write_text(json.dumps(json.loads(second.read_text()) | dict(version='0.0.1')))
    with pytest.warns(UserWarning, match='several versions.*0.0.1'): df = study.run(progress=False)
    assert sorted(df.version)==sorted(['unknown', '0.0.1', adverfine.__version__])
    assert '1 by unknown' in in_words(read_study(study.out))
    assert '1 by 0.0.1' in write_report(study)['report.html'].read_text()

def test_a_race_with_other_images_is_another(tmp_path):
    from adverfine.bench.kept import KeptResults, that_matter
    def folder(**kwargs): return KeptResults(tmp_path, data='digits', **that_matter(kwargs))
    folder(n_train=100, path='here')
    folder(n_train=100, path='there', download=True)
    with pytest.raises(ValueError, match='n_train'): folder(n_train=200, path='here')

def test_compressed_cells_are_attacked_from_their_parent(tmp_path, monkeypatch):
    import adverfine.evaluation.guards as guards
    asked = []
    def transferred(attack, surrogate):
        asked.append({k: v.clone() for k,v in surrogate.state_dict().items()})
        return attack
    monkeypatch.setattr(guards, 'Transfer', transferred)
    study = Study.quick('digits', out=tmp_path, **dict(tiny, levels=(.6,), bits=(), fine_tunings=('standard',)))
    study.run(progress=False)
    dense = load_file(next((tmp_path/'parents').iterdir()))
    assert len(asked)==1         # not the uncompressed one
    kernels = [sorted((o.shape, o.sum().item()) for o in w.values() if o.dim()==4) for w in (asked[0], dense)]
    assert len(kernels[0])>2 and kernels[0]==kernels[1]

def _report(**kwargs):
    given = dict(clean=.9, robust=.4, n=100, threat=ThreatModel(.1), attacks=(), took={},
                 robust_after={'PGD-20': .5, 'guard': .4}, passes={'PGD-20': 4000, 'guard': 100}, seconds=1.,
                 split='test')
    return RobustnessReport(**given | kwargs)

def test_what_a_row_says_of_a_report():
    row = judged(_report())
    assert (row['robust'], row['passes'], row['verdict'], row['reasons'])==(.4, 41., 'trusted', '')
    swept = judged(_report(), dict(clean=.8, robust=.5, n=1000), by_sweep=True)       # the figure of the reference
    assert [swept[k] for k in ('clean', 'robust', 'n', 'judged_robust', 'sweep_n')]==[.8, .5, 1000, .4, 1000]
    beside = judged(_report(), dict(clean=.8, robust=.5, n=1000))
    assert [beside[k] for k in ('clean', 'robust', 'n', 'sweep_robust')]==[.9, .4, 100, .5]
    low,high = interval(.4, 100)
    assert (row['robust_low'], row['robust_high'], row['robust_ci'])==pytest.approx((low, high, (high-low)/2))

@pytest.mark.parametrize('k', [2, 3, 5, 11, 12, 30, 200])
def test_the_interval_over_seeds_is_students(k):
    values = torch.rand(k, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t,free = seeds_half_width(values.tolist())*k**.5/values.std().item(),k-1
    x = torch.linspace(0, t, 200_001, dtype=torch.float64)
    scale = math.exp(math.lgamma((free+1)/2)-math.lgamma(free/2))/(free*math.pi)**.5
    within = 2*torch.trapezoid(scale*(1+x**2/free)**(-(free+1)/2), x).item()
    assert within==pytest.approx(.95, abs=2e-4)
    assert pd.isna(seeds_half_width([.5]))

def test_intervals_in_table_and_figure_lean_as_wilsons_do():
    cell = dict(data='digits', parent='standard', compression='none', level=0, label='none-0', fine_tuning='standard',
                attack='PGD-20', eps=.1, params=1, macs=1, bytes=1, latency_ms=1., seconds=1., verdict='trusted')
    rows = [completed(dict(cell, seed=k, clean=.98-.04*k, robust=.02+.04*k, n=100)) for k in range(2)]
    one,two = (pd.DataFrame(rows[:k], columns=columns) for k in (1, 2))
    low,high = (100*o for o in interval(.98, 100))
    assert accuracy_table(one).standard[0].startswith(f'98.0 [{low:.1f}, {high:.1f}] / 2.0 [')
    assert accuracy_table(two).standard[0].startswith('96.0 [') and accuracy_table(two).standard[0].count('±25.4')==2
    for verdict,broken,bound in (('trusted', False, 0), ('not converged', True, 1), ('gradient masking', False, 1),
                                 ('gradient masking', True, 0), ('gradient masking', None, 1)):
        assert accuracy_table(two.assign(verdict=verdict, broken=broken)).standard[0].count('≤')==bound
    mixed = two.assign(verdict=['trusted', 'not converged'])
    assert '/ ≤4.0 [' in accuracy_table(mixed).standard[0]
    for df in (one, two):
        bars = [o for c in plot_study(df).axes[0].containers for o in c.lines[2]]
        clean = bars[0].get_segments()[0][:,1]
        assert clean==pytest.approx([df.clean_low.mean(), df.clean_high.mean()])
        assert len(bars)==2*len(df)     # clean and robust, and for several seeds a broad bar beside each

def test_the_figure_says_that_stronger_attacks_followed():
    cell = dict(data='digits', seed=0, parent='standard', compression='none', level=0, label='none-0',
                fine_tuning='standard', attack='PGD-20', eps=.1, params=1, macs=1, bytes=1, latency_ms=1.,
                seconds=1., verdict='trusted')
    for more,title in ((dict(escalated=True), 'PGD-20, escalated, eps'), ({}, 'PGD-20, eps')):
        row = completed(dict(cell, clean=.9, robust=.5, n=100) | more)
        assert title in plot_study(pd.DataFrame([row])).get_suptitle()
