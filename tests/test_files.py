"Files that several processes write at once, that are killed while they write, and links that somebody planted"
import os, signal, stat, subprocess, sys, threading
import pytest
from adverfine import files
from adverfine.files import locked, write_atomic

posix = pytest.mark.skipif(sys.platform=='win32', reason='links, signals and locks of POSIX')

def _python(code, *args):
    "A process that runs `code`"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen([sys.executable, '-c', code, *map(str, args)], text=True, **pipes)

writer = '''
import sys
from adverfine.files import write_atomic
path,letter = sys.argv[1:]
for k in range(300): write_atomic(path, letter*(1000+k))
'''

def test_three_writers_of_one_file(tmp_path):
    file = tmp_path/'results.csv'
    write_atomic(file, 'a'*1000)
    writers = [_python(writer, file, o) for o in 'abc']
    while any(o.poll() is None for o in writers):
        seen = file.read_text()
        assert len(seen)>=1000 and set(seen) in ({'a'}, {'b'}, {'c'})
    assert [(o.returncode, o.stderr.read()) for o in writers]==[(0, '')]*3
    assert list(tmp_path.iterdir())==[file]

@posix
def test_a_link_is_replaced_and_not_followed(tmp_path, monkeypatch):
    secret,file = tmp_path/'secret',tmp_path/'out'/'note.txt'
    secret.write_text('keep')
    file.parent.mkdir()
    file.symlink_to(secret)
    write_atomic(file, 'mine')
    assert file.read_text()=='mine' and not file.is_symlink()
    (file.parent/'.note.txt.part').symlink_to(secret)    # the name that it once was
    write_atomic(file, 'again')
    assert file.read_text()=='again'
    monkeypatch.setattr(files.secrets, 'token_hex', lambda n: 'guessed')
    (file.parent/'.note.txt.guessed.part').symlink_to(secret)
    with pytest.raises(OSError, match='note.txt'): write_atomic(file, 'third')
    assert file.read_text()=='again' and secret.read_text()=='keep'

killed = '''
import os, sys
from adverfine.files import write_atomic
def stop(fd): os.kill(os.getpid(), 9)
os.fsync = stop
write_atomic(sys.argv[1], 'new'*1000)
'''

@posix
def test_a_killed_writer_leaves_the_old_content(tmp_path):
    file = tmp_path/'note.txt'
    write_atomic(file, 'old')
    assert _python(killed, file).wait()==-signal.SIGKILL
    assert file.read_text()=='old'
    write_atomic(file, 'new')
    assert file.read_text()=='new'

@posix
def test_the_umask_decides_who_may_read(tmp_path):
    old = os.umask(0o027)
    try: write_atomic(tmp_path/'note.txt', b'')
    finally: os.umask(old)
    assert stat.S_IMODE((tmp_path/'note.txt').stat().st_mode)==0o640

def test_long_names(tmp_path):
    write_atomic(tmp_path/('n'*255), 'x')
    write_atomic(tmp_path/('ä'*127), 'x')

holder = '''
import sys, time
from adverfine.files import locked
with locked(sys.argv[1]):
    print('in', flush=True)
    time.sleep(600)
'''

@posix
def test_a_killed_holder_lets_the_next_one_in(tmp_path):
    holds = _python(holder, tmp_path/'study')
    assert holds.stdout.readline()=='in\n'
    entered = threading.Event()
    def enter():
        with locked(tmp_path/'study'): entered.set()
    waits = threading.Thread(target=enter)
    waits.start()
    assert not entered.wait(.5)
    holds.kill()
    waits.join(60)
    assert entered.is_set() and not list((tmp_path/'study').iterdir())

def test_without_fcntl_nothing_is_locked(tmp_path, monkeypatch):
    monkeypatch.setattr(files, 'fcntl', None)
    with locked(tmp_path/'study'), locked(tmp_path/'study'): write_atomic(tmp_path/'study'/'note.txt', 'x')
