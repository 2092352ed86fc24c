"Engines of a study: the same figures as one run alone, whatever is killed, and what is refused before anything starts"
import importlib, importlib.util, os, random, signal, socket, subprocess, sys, threading, time
from contextlib import contextmanager, suppress
from pathlib import Path
import pandas as pd, pytest
from adverfine.cli import main
from adverfine.files import write_atomic
from adverfine.study.claims import claims_in
from adverfine.study import cluster as engine
from adverfine.study.cluster import Ray
from adverfine.study.engines import engine_named
from adverfine.study.processes import Processes
from adverfine.study.status import study_status
from adverfine.study.study import Study, StudyFailed
import adverfine.study.presets  # noqa: F401 makers of studies

tiny = dict(levels=(.5,), bits=(4,), epochs=3, fine_tune_epochs=1, n_train=300, n_test=60, steps=3, train_steps=1,
            escalate=False, seeds=(0, 1))
options = ('--levels 0.5 --bits 4 --epochs 3 --fine-tune-epochs 1 --n-train 300 --n-test 60 --steps 3 --train-steps 1 '
           '--no-escalate --seeds 0 1').split()
measured = 'latency_ms seconds training_seconds device clean_seeds robust_seeds level'.split()
few = dict(levels=(), seeds=(0,))     # a part of it; `measured` is what two runs may differ in
needs_ray = pytest.mark.skipif(not importlib.util.find_spec('ray'), reason='needs the extra ray')

def figures(out):
    table = pd.read_csv(out/'results.csv', dtype=str).drop(columns=measured).fillna('')
    return table.set_index(['seed', 'label', 'fine_tuning'], drop=False).to_dict('index')

def of_some(alone): return {k: v for k,v in alone.items() if k[0]=='0' and 'prune' not in k[1]}
def study(out, **more): return Study.quick('digits', out=out, **(tiny | more))

@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    "The figures of a run without an engine"
    out = tmp_path_factory.mktemp('alone')
    study(out).run(progress=False)
    return figures(out)

@contextmanager
def meanwhile(harm):
    "Do `harm` in a thread for the length of a block; what goes wrong in it is raised at the end"
    errors = []
    def guarded():
        try: harm()
        except BaseException as e: errors.append(e)
    thread = threading.Thread(target=guarded)
    thread.start()
    try: yield
    finally: thread.join()
    if errors: raise errors[0]

def until(seen, seconds=90):
    "Wait until `seen()` is true, and return that"
    for _ in range(seconds*20):
        if found := seen(): return found
        time.sleep(.05)
    raise TimeoutError('nothing was seen')

def at_work(out):
    "Processes that have a claim"
    return {o['pid'] for o in claims_in(out/'claims').values() if 'pid' in o}

def test_processes_that_are_killed_lose_nothing(tmp_path, alone):
    rng,killed = random.Random(0),set()
    def kill():
        while len(killed)<3:
            pid = until(lambda: at_work(tmp_path)-killed).pop()
            time.sleep(rng.uniform(0, 1))
            os.kill(pid, signal.SIGTERM if len(killed)==1 else signal.SIGKILL)    # told to end, or killed
            killed.add(pid)
    with meanwhile(kill): study(tmp_path).run(progress=False, engine=Processes(2))
    assert len(killed)==3 and os.getpid() not in killed
    assert figures(tmp_path)==alone and not list((tmp_path/'claims').glob('*'))

def test_processes_stop_with_the_one_that_started_them(tmp_path):
    command = [sys.executable, '-W', 'ignore', '-c', 'from adverfine.cli import main; raise SystemExit(main())',
               'study', 'digits', '--out', str(tmp_path), '--engine', 'processes', '--workers', '2', *options]
    for sign,status in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))   # CI may ignore it
        pids = until(lambda: at_work(tmp_path))
        run.send_signal(sign)
        assert run.wait(30)==status
        if sign==signal.SIGINT: assert 'the same command goes on from there' in run.stderr.read()
        until(lambda: not any(Path(f'/proc/{o}').exists() for o in pids), 15)

def test_a_recipe_that_fails_in_a_worker_stops_nothing_else(tmp_path, monkeypatch):
    folder = tmp_path/'own'
    write_atomic(folder/'own_recipes.py', 'def broken(learn): raise RuntimeError("out of order")')
    monkeypatch.syspath_prepend(folder)
    from adverfine.study.protocol import FineTune
    broken = importlib.import_module('own_recipes').broken
    small = dict(levels=(), bits=(), seeds=(0,), fine_tunings=['none', FineTune(broken)])
    with pytest.raises(StudyFailed, match='1 of 3 jobs failed, first standard-seed0-none-0-broken: RuntimeError'):
        study(tmp_path/'out', **small).run(progress=False, engine=Processes(1))
    status = study_status(tmp_path/'out')
    assert [len(status.done), status.failed] == [1, {'standard-seed0-none-0-broken': 'RuntimeError: out of order'}]
    assert '1 failed' in str(status)

@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid()!=0, reason='needs to mount a small disk')
def test_a_disk_that_is_full_for_a_while_is_waited_for(tmp_path, alone):
    out = tmp_path/'disk'
    out.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=8m', 'tmpfs', out], capture_output=True).returncode:
        pytest.skip('mounting is not allowed here')
    try:
        def fill():
            until(lambda: list((out/'cells').glob('*.json')))
            with suppress(OSError), open(out/'ballast', 'wb', buffering=0) as f:
                while f.write(bytes(4096)): pass
            try:
                before = len(list((out/'cells').glob('*.json')))
                time.sleep(10)
                assert len(list((out/'cells').glob('*.json')))==before<18
            finally: (out/'ballast').unlink()
        with meanwhile(fill): study(out).run(progress=False, engine=Processes(2))
        assert figures(out)==alone
    finally: subprocess.run(['umount', '-l', out], check=True)

# ------------------------------------------------------------------------------------------------------------- Ray

@pytest.fixture(scope='module')
def cluster():
    "A cluster on the loopback address: a head of one core, and `worker()` for further ones"
    os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')
    from ray.cluster_utils import Cluster
    own = dict(node_ip_address='127.0.0.1', include_dashboard=False)
    there = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, object_store_memory=80*2**20, **own))
    there.worker = lambda: there.add_node(num_cpus=1, node_ip_address='127.0.0.1', object_store_memory=80*2**20)
    try: yield there
    finally: there.shutdown()

@needs_ray
def test_a_node_that_is_killed_loses_nothing(tmp_path, alone, cluster):
    node = cluster.worker()
    def kill():
        until(lambda: len(list((tmp_path/'cells').glob('*.json')))>1)
        cluster.remove_node(node, allow_graceful=False)
    with meanwhile(kill): study(tmp_path, **few).run(progress=False, engine=Ray(cluster.address))
    assert figures(tmp_path)==of_some(alone) and len(of_some(alone))==6 and not list((tmp_path/'claims').glob('*'))

@needs_ray
def test_a_full_object_store_changes_nothing(tmp_path, alone, cluster):
    import numpy as np
    import ray
    with engine._loopback(ray, cluster.address): ray.init(cluster.address, log_to_driver=False)
    try:
        ballast = [ray.put(np.zeros(2**20, dtype=np.uint8)) for _ in range(120)]    # more than the store holds
        study(tmp_path, **few).run(progress=False, engine='ray')
        assert ray.is_initialized() and len(ballast)==120      # whoever connected stays connected
    finally: ray.shutdown()
    assert figures(tmp_path)==of_some(alone)

@needs_ray
def test_folders_and_versions_that_differ_are_noticed(tmp_path, cluster, monkeypatch):
    monkeypatch.setattr(engine, '__version__', '9.9')
    with pytest.raises(ValueError, match='has adverfine .* and this machine 9.9: install the same'):
        study(tmp_path).run(progress=False, engine=Ray(cluster.address))
    monkeypatch.undo()
    monkeypatch.setattr(engine, 'write_atomic', lambda *args: None)      # a file that no machine finds
    with pytest.raises(ValueError, match='does not see .*name a folder that all machines share'):
        study(tmp_path).run(progress=False, engine=Ray(cluster.address))
    assert not list(tmp_path.glob('cells/*')) and not list(tmp_path.glob('.probe*'))

@needs_ray
@pytest.mark.parametrize('asked,why', [(dict(gpus=9), 'a task asks for 9 GPU: no machine here has more than'),
                                       (dict(cpus=999), 'a task asks for 999 CPU')])
def test_more_than_there_is_is_refused(tmp_path, cluster, asked, why):
    with pytest.raises(ValueError, match=why): study(tmp_path).run(progress=False, engine=Ray(cluster.address, **asked))

@needs_ray
def test_an_address_without_an_answer_is_said_soon(tmp_path):
    since = time.monotonic()
    with pytest.raises(ValueError, match='no Ray cluster answers there'):
        study(tmp_path).run(progress=False, engine=Ray('127.0.0.1:1'))
    with socket.create_server(('127.0.0.1', 0)) as other:       # somebody is there, who never says anything
        with pytest.raises(ValueError, match='no Ray cluster answers there'):
            study(tmp_path).run(progress=False, engine=Ray(f'127.0.0.1:{other.getsockname()[1]}'))
    with pytest.raises(ValueError, match='write it as host:port'): Ray('somewhere')
    assert time.monotonic()-since<40

def test_without_ray_its_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'ray', None)
    with pytest.raises(ImportError, match=r'adverfine\[ray\]'):
        study(tmp_path/'out').run(progress=False, engine='ray')
    assert not (tmp_path/'out').exists()

@pytest.mark.parametrize('line,why', [
    ('--engine slurm', "engine 'slurm' is not offered: use one of serial, processes, ray"),
    ('--workers 2', "workers=2: the engine 'serial' takes no options"),
    ('--engine processes --gpus 1', "gpus=1.0: the engine 'processes' takes workers"),
    ('--engine processes --workers 0', 'workers=0: ask for 1 or more'),
    ('--engine ray --cpus 0', 'cpus=0 is too small'),
    ('--engine ray --address 10.0.0.1:6379 --workers 2', 'the cluster at 10.0.0.1:6379 has its own')])
def test_engines_that_cannot_be_are_one_sentence(tmp_path, capsys, line, why):
    assert main(['study', 'digits', '--out', str(tmp_path/'out'), *line.split()])==2
    said = capsys.readouterr().err
    assert why in said and said.count('\n')==1 and not (tmp_path/'out').exists()

def test_engines_have_names():
    assert engine_named('processes', workers=2)==Processes(2) and engine_named(Ray())==Ray()
