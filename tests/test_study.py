"A study that is killed, interrupted, extended or misused"
import json, os, signal, subprocess, sys, time, warnings
import pandas as pd, pytest, torch
from safetensors.torch import load_file
from adverfine.networks.zoo import cnn8
from adverfine.data.pixels import pixels
from adverfine.data.sources import digits_dls
from adverfine.study.study import Study
from adverfine.study.tables import accuracy_table, plot_study
from adverfine.study.page import in_words, write_report

tiny = dict(levels=(.3,.6), bits=(4,), epochs=3, fine_tune_epochs=1, n_train=300, n_test=60, steps=3, train_steps=1)
options = ('--levels 0.3 0.6 --bits 4 --epochs 3 --fine-tune-epochs 1 --n-train 300 --n-test 60 --steps 3 '
           '--train-steps 1').split()
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
    a,b = (pd.read_csv(o/'results.csv', dtype=str).drop(columns=['latency_ms', 'seconds']) for o in (whole, killed))
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
    Study('digits', out=tmp_path, **dict(tiny, levels=(.3,), bits=())).run(progress=False)
    stamp = {f: f.stat().st_mtime_ns for f in (tmp_path/'cells').iterdir()}
    more = Study('digits', out=tmp_path, **tiny)
    assert len(more.run(progress=False))==12
    assert len(stamp)==6 and all(f.stat().st_mtime_ns==t for f,t in stamp.items())
    df = pd.read_csv(tmp_path/'results.csv')
    assert list(df.columns)==('data seed parent compression level fine_tuning clean robust clean_ci robust_ci n attack '
                              'eps params macs bytes latency_ms seconds version').split()
    assert df.notna().all().all() and (df.robust<df.clean).all()   # PGD takes something of each
    net,test = cnn8(size=8).eval(),digits_dls(n_train=300, n_test=60).test
    net.load_state_dict(load_file(next((tmp_path/'parents').iterdir())))
    x,y = pixels(test)
    with torch.no_grad(): right = net(x*2-1).argmax(1)==y
    assert df.clean[0]==pytest.approx(right.float().mean().item())
    files = write_report(more)
    assert files and all(f.stat().st_size for f in files.values())
    for bad in (dict(eps=.2), dict(steps=4), dict(n_test=50)):
        other = Study('digits', out=tmp_path, **{**tiny, **bad})
        with pytest.raises(ValueError, match='holds another study'): other.run(progress=False)

def test_damaged_files_are_named(tmp_path):
    study = Study('digits', out=tmp_path, **dict(tiny, levels=(), bits=()))
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
    study = Study('digits', out=tmp_path, **{**tiny, **grid})
    df = study.run(progress=False)
    assert len(df)==12 and len(list((tmp_path/'parents').iterdir()))==4
    assert '±' in accuracy_table(df).to_string()
    assert len(plot_study(df).axes)==4

@pytest.mark.parametrize('fine_tunings', [('none',), ('standard',)])
def test_any_part_of_the_grid_can_be_drawn(tmp_path, fine_tunings):
    study = Study('digits', out=tmp_path, **dict(tiny, levels=(), bits=(), fine_tunings=fine_tunings))
    study.run(progress=False)
    write_report(study)

claimer = '''
import sys
from adverfine.study.study import Study
study = Study('digits', out=sys.argv[1], seeds=(0,), eps=float(sys.argv[2]))
sys.stdin.readline()
try: study.claim()
except ValueError: sys.exit(3)
'''

def test_a_folder_belongs_to_whoever_came_first(tmp_path):
    def claim(eps):
        command = [sys.executable, '-c', claimer, tmp_path/'out', eps]
        return subprocess.Popen(command, stdin=subprocess.PIPE, text=True, env=env)
    claims = [claim(o) for o in ('.1', '.2', '.3')]
    time.sleep(.1)
    for o in claims:
        o.stdin.write('\n')
        o.stdin.flush()
    assert sorted(o.wait() for o in claims)==[0, 3, 3]

def test_one_number_of_bits():
    said = r'one number of bits.*quantize\(bits=\(1, 8\)\) takes two'
    with pytest.raises(ValueError, match=said): Study('digits', bits=((1, 8),))

def test_rows_of_several_versions_are_said_to_be(tmp_path):
    import adverfine
    study = Study('digits', out=tmp_path, **dict(tiny, levels=(), bits=()))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        assert set(study.run(progress=False).version)=={adverfine.__version__}
    assert not [o for o in said if 'several versions' in str(o.message)] and 'several versions' not in in_words(study)
    first,second = sorted((tmp_path/'cells').iterdir())[:2]
    row = json.loads(first.read_text())
    first.write_text(json.dumps({k: v for k,v in row.items() if k!='version'}))  # as it was once written
    second.write_text(json.dumps(json.loads(second.read_text()) | dict(version='0.0.1')))
    with pytest.warns(UserWarning, match='several versions.*0.0.1'): df = study.run(progress=False)
    assert sorted(df.version)==sorted(['unknown', '0.0.1', adverfine.__version__])
    assert pd.read_csv(tmp_path/'results.csv').columns[-1]=='version'
    assert '1 by unknown' in in_words(study) and '1 by 0.0.1' in write_report(study)['report.html'].read_text()

def test_a_race_with_other_images_is_another(tmp_path):
    from adverfine.bench.recipes import _Folder, _that_matter
    def folder(**kwargs): return _Folder(tmp_path, data='digits', **_that_matter(kwargs))
    folder(n_train=100, path='here')
    folder(n_train=100, path='there', download=True)
    with pytest.raises(ValueError, match='n_train'): folder(n_train=200, path='here')
