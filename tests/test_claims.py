"Runs that share a folder: nothing twice, nothing lost, and what the dead were doing is done by others"
import json, os, random, signal, subprocess, sys, time
import pandas as pd, pytest
from adverfine.study.claims import Claim
from adverfine.study.study import Study
import adverfine.study.presets  # noqa: F401 makers of studies

tiny = dict(levels=(.3, .6), bits=(4,), epochs=3, fine_tune_epochs=1, n_train=300, n_test=60, steps=3, train_steps=1,
            escalate=False, seeds=(0, 1))
options = ('--levels 0.3 0.6 --bits 4 --epochs 3 --fine-tune-epochs 1 --n-train 300 --n-test 60 --steps 3 '
           '--train-steps 1 --no-escalate --seeds 0 1').split()
cli = 'import sys; from adverfine.cli import main; sys.exit(main())'
measured = 'latency_ms seconds training_seconds device'.split()     # what no two runs have in common

def start(out):
    command = [sys.executable, '-W', 'ignore', '-c', cli, 'study', 'digits', '--out', str(out), *options]
    return subprocess.Popen(command, env=dict(os.environ, OMP_NUM_THREADS='1'), stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)

def figures(out): return pd.read_csv(out/'results.csv', dtype=str).drop(columns=measured).to_csv()

@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    "The figures of one run"
    out = tmp_path_factory.mktemp('alone')
    Study.quick('digits', out=out, **tiny).run(progress=False)
    return figures(out)

def test_two_runs_share_a_folder(tmp_path, alone):
    runs = [start(tmp_path) for _ in range(2)]
    said = [o.communicate() for o in runs]
    assert [o.returncode for o in runs]==[0, 0], said
    assert figures(tmp_path)==alone
    stamps = sorted((tmp_path/'cells').iterdir(), key=os.path.getmtime)
    assert len(stamps)==24 and not list((tmp_path/'claims').glob('*')) and not (tmp_path/'failures').exists()

def test_what_the_dead_were_doing_is_done_by_others(tmp_path, alone):
    rng,first = random.Random(0),start(tmp_path)
    killed = 0
    while killed<3:
        victim = start(tmp_path)
        time.sleep(rng.uniform(7, 12))
        if victim.poll() is None: os.kill(victim.pid, signal.SIGKILL)
        victim.communicate()
        killed += 1
    _,err = first.communicate()
    assert first.returncode==0, err
    assert figures(tmp_path)==alone and not list((tmp_path/'claims').glob('*'))

def test_a_claim_of_another_machine_expires(tmp_path, monkeypatch):
    from adverfine.study import claims
    claim = Claim(tmp_path/'cell')
    claim.file.write_text(json.dumps(dict(place='elsewhere', pid=1, birth=[], token='x')))
    assert not claim.take()
    os.utime(claim.file, (time.time()-2*claims.stale,)*2)
    assert claim.take()

def test_a_claim_is_kept_alive_while_it_is_held(tmp_path, monkeypatch):
    from adverfine.study import claims
    monkeypatch.setattr(claims, 'beat', .05)
    monkeypatch.setattr(claims, 'stale', .5)
    with claims.held(tmp_path/'cell') as mine:
        assert mine
        said = json.loads((tmp_path/'cell').read_text())
        (tmp_path/'cell').write_text(json.dumps(said | dict(place='another machine')))
        for _ in range(10):
            time.sleep(.1)
            assert not Claim(tmp_path/'cell').take()
