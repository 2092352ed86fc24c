"What tools/gpu.py asks for, on a machine without a GPU"
import runpy, subprocess, sys
from pathlib import Path
import torch
import adverfine.cli as cli, adverfine.commands.benches as benches, adverfine.commands.studies as studies
from adverfine.bench.menu import benchmarks

script = str(Path(__file__).resolve().parents[1]/'tools/gpu.py')

def _run(*options):
    words = [sys.executable, script, '--fashion-mnist', 'a', '--cifar10', 'b', *options]
    return subprocess.run(words, capture_output=True, text=True)

def test_the_command_line_understands_each_command(monkeypatch):
    begun = []
    def _study(args): begun.append(args)
    def _bench(args): begun.append(args)
    for room,begin in (studies, _study), (benches, _bench): monkeypatch.setattr(room, begin.__name__, begin)
    steps = runpy.run_path(script)['steps']('a', 'b', 'c')
    commands = [o for name,commands in steps.items() if name!='tests' for o in commands]
    for words in commands: assert cli.main(words[3:])==0, words
    assert len(begun)==len(commands) and {o.what for o in begun if o.command=='bench'}<=set(benchmarks)

def test_it_says_what_it_would_run_and_that_there_is_no_gpu():
    listed = _run('--list', '--only', 'tests', 'speedrun')
    assert listed.returncode==0 and listed.stdout.count('speedrun: ')==2 and 'training' not in listed.stdout
    if not torch.cuda.is_available(): assert 'torch finds no GPU here' in _run().stderr

def test_a_command_that_fails_ends_its_step(tmp_path):
    run = runpy.run_path(script)['run']
    words = [[sys.executable, '-c', f'print({k}); exit({k})'] for k in (0, 3, 4)]
    assert run(words, tmp_path/'log')==3
    assert '\n3\n' in (tmp_path/'log').read_text() and '\n4\n' not in (tmp_path/'log').read_text()
