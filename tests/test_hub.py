"A saved network travels over the Hub: a small server on the loopback address speaks what the client asks for"
import base64, hashlib, json, os, re, subprocess, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit
import pytest, torch, yaml
from fastai.vision.all import Learner
from adverfine.all import PGD, cnn8, digits_dls, load_compressed
from adverfine.deployment.hub import from_hub, pull_folder, push_folder

pytest.importorskip('huggingface_hub')

class Server(BaseHTTPRequestHandler):
    "Repositories in memory, one branch each: a list of (commit, files)"
    protocol_version = 'HTTP/1.1'
    def log_message(self, *_): pass

    def answer(self, body=b'', status=200, **headers):
        if not isinstance(body, bytes): body = json.dumps(body).encode()
        self.send_response(status)
        for k,v in {'Content-Length': len(body), 'Content-Type': 'application/json', **headers}.items():
            self.send_header(k.replace('_', '-'), str(v))
        self.end_headers()
        if self.command!='HEAD': self.wfile.write(body)

    @property
    def asked(self):
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((self.command, path))
        return path

    def missing(self, what): self.answer({'error': what}, 404, X_Error_Code=what)

    def files(self, repo, revision):
        for commit,files in reversed(self.server.repos[repo]):
            if revision in ('main', commit): return commit,files

    def do_POST(self):
        sent = self.rfile.read(int(self.headers['Content-Length'] or 0))
        path,repos = self.asked,self.server.repos
        if self.headers.get('Authorization')!='Bearer secret': return self.answer({'error': 'who are you?'}, 401)
        if path=='/api/validate-yaml': return self.answer({'errors': [], 'warnings': []})
        if path=='/api/repos/create':
            o = json.loads(sent)
            name = '/'.join(filter(None, (o.get('organization'), o['name'])))
            repos.setdefault(name, [('0'*40, {})])
            return self.answer({'url': f'http://{self.headers["Host"]}/{name}', 'name': name, 'id': '1'})
        repo,verb = re.fullmatch('/api/models/([^/]+/[^/]+)/(preupload|commit)/main', path).groups()
        if verb=='preupload':
            return self.answer({'files': [dict(path=o['path'], uploadMode='regular', shouldIgnore=False, oid=None)
                                          for o in json.loads(sent)['files']]})
        lines = [json.loads(o) for o in sent.splitlines()]
        files = dict(self.files(repo, 'main')[1])
        for o in lines:
            if o['key']=='file': files[o['value']['path']] = base64.b64decode(o['value']['content'])
            if o['key']=='deletedFile': files.pop(o['value']['path'])
        commit = hashlib.sha1(sent).hexdigest()
        repos[repo].append((commit, files))
        url = f'http://{self.headers["Host"]}/{repo}/commit/{commit}'
        self.answer({'success': True, 'commitOid': commit, 'commitUrl': url})

    def do_GET(self):
        path = self.asked
        repo = '/'.join(path.removeprefix('/api/models').strip('/').split('/')[:2])
        if repo not in self.server.repos: return self.missing('RepoNotFound')
        if m := re.search('/(?:revision|tree|resolve)/([^/]+)', path): found = self.files(repo, m[1])
        else: found = self.files(repo, 'main')
        if found is None: return self.missing('RevisionNotFound')
        commit,files = found
        if '/tree/' in path:
            return self.answer([dict(type='file', path=k, size=len(v), oid=hashlib.sha1(v).hexdigest())
                                for k,v in files.items()])
        if '/resolve/' in path:
            name = path.split('/resolve/')[1].split('/', 1)[1]
            if name not in files: return self.missing('EntryNotFound')
            return self.answer(files[name], ETag=f'"{hashlib.sha1(files[name]).hexdigest()}"', X_Repo_Commit=commit,
                               Content_Type='application/octet-stream')
        self.answer({'id': repo, 'modelId': repo, 'sha': commit, 'siblings': [{'rfilename': k} for k in files],
                     'tags': [], 'private': False, 'downloads': 0, 'likes': 0})
    do_HEAD = do_GET

@pytest.fixture
def hub(tmp_path, monkeypatch):
    "The server, which the client takes for the Hub"
    import huggingface_hub.constants
    server = ThreadingHTTPServer(('127.0.0.1', 0), Server)
    server.repos,server.asked = {},[]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = f'http://127.0.0.1:{server.server_port}'
    monkeypatch.setattr(huggingface_hub.constants, 'ENDPOINT', server.url)
    monkeypatch.setattr(huggingface_hub.constants, 'HUGGINGFACE_CO_URL_TEMPLATE',
                        server.url+'/{repo_id}/resolve/{revision}/{filename}')
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path/'cache'))
    yield server
    server.shutdown()

@pytest.fixture(scope='module')
def learn():
    learn = Learner(digits_dls(), cnn8(size=8), loss_func=torch.nn.CrossEntropyLoss())
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 5e-3)
    return learn.quantize(4)

def logits(model):
    with torch.no_grad(): return model(torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0)))

def test_a_network_comes_back_as_it_went(hub, learn):
    report = learn.robustness(PGD(.1, steps=3), n=20)
    commit = learn.push_to_hub('me/small', report, license='apache-2.0', datasets=['optdigits'], base_model='me/large',
                               token='secret')
    assert re.fullmatch('[0-9a-f]{40}', commit)
    again = from_hub('me/small')
    assert torch.equal(logits(again), logits(learn.model.eval()))
    files = hub.repos['me/small'][-1][1]
    assert sorted(o.split('-')[0] for o in files)==['README.md', 'config.json', 'model', 'model.json']
    assert ('GET', '/me/small/resolve/'+commit+'/config.json') in hub.asked      # what the Hub counts

    head = yaml.safe_load(files['README.md'].decode().split('---')[1])
    assert head['library_name']=='adverfine' and head['pipeline_tag']=='image-classification'
    assert head['license']=='apache-2.0'
    assert head['datasets']==['optdigits'] and head['base_model']=='me/large'
    clean,robust = head['model-index'][0]['results'][0]['metrics']
    assert (clean['value'], robust['value']) == (report.clean, report.robust)
    assert robust['args']['eps']==.1 and robust['args']['verdict']==report.verdict and 'PGD' in robust['args']['attack']

def test_a_commit_stays_what_it_is(hub, learn, tmp_path):
    first = learn.push_to_hub('me/small', token='secret')
    old = logits(from_hub('me/small', revision=first))
    other = Learner(digits_dls(), cnn8(size=8), loss_func=torch.nn.CrossEntropyLoss())
    second = other.push_to_hub('me/small', token='secret')
    assert len([o for o in hub.repos['me/small'][-1][1] if o.endswith('.safetensors')])==1     # the first's are gone
    assert torch.equal(logits(from_hub('me/small', revision=first)), old)
    assert torch.equal(logits(from_hub('me/small')), logits(other.model.eval()))
    folder = pull_folder('me/small', tmp_path/'here', revision=second)
    assert folder==tmp_path/'here' and torch.equal(logits(load_compressed(folder)), logits(other.model))

def test_what_was_fetched_is_there_without_a_network(hub, learn):
    learn.push_to_hub('me/small', token='secret')
    want = logits(from_hub('me/small'))
    hub.shutdown()
    hub.server_close()
    assert torch.equal(logits(from_hub('me/small')), want)
    with pytest.raises(OSError, match='me/other cannot be pulled'): from_hub('me/other')

def test_only_a_network_is_fetched_and_nothing_is_run(hub, learn, tmp_path):
    learn.push_to_hub('me/small', token='secret')
    commit,files = hub.repos['me/small'][-1]
    files |= {'model.pkl': b'x', 'code.py': b'raise SystemExit', 'sub/model.json': b'{}'}
    folder = pull_folder('me/small', tmp_path/'here')
    assert not any((folder/o).exists() for o in ('model.pkl', 'code.py', 'sub'))
    files['model.json'] = files['model.json'].replace(b'"version"', b'"Version"')
    hub.repos['me/small'].append(('f'*40, files))
    with pytest.raises(ValueError, match='its checksum is another'): from_hub('me/small', revision='f'*40)

def test_refusals_are_sentences(hub, learn, tmp_path):
    with pytest.raises(OSError, match='me/none cannot be pulled .* look at name') as e: from_hub('me/none')
    assert '\n' not in str(e.value)
    learn.push_to_hub('me/small', token='secret')
    with pytest.raises(OSError, match='me/small cannot be pulled'): from_hub('me/small', revision='nowhere')
    with pytest.raises(OSError, match='me/small cannot be pushed to .*401'):
        learn.push_to_hub('me/small', token='wrong')
    with pytest.raises(ValueError, match='write owner/name'): learn.push_to_hub('not a name', token='secret')
    learn.save_compressed(tmp_path/'net')
    weights = next((tmp_path/'net').glob('*.safetensors'))
    weights.write_bytes(weights.read_bytes()[:-1])
    sent = len(hub.asked)
    with pytest.raises(ValueError, match='damaged'): push_folder(tmp_path/'net', 'me/small', token='secret')
    assert len(hub.asked)==sent

def test_the_command_line_pushes_and_pulls(hub, learn, tmp_path):
    learn.save_compressed(tmp_path/'net')
    code = 'import sys; from adverfine.cli import main; sys.exit(main())'
    env = dict(os.environ, HF_ENDPOINT=hub.url, HF_TOKEN='secret', HF_HOME=str(tmp_path/'home'))
    def adverfine(*words):
        return subprocess.run([sys.executable, '-c', code, *map(str, words)], capture_output=True, text=True, env=env)
    pushed = adverfine('push', tmp_path/'net', 'me/small', '--license', 'mit')
    assert pushed.returncode==0, pushed.stderr
    commit = pushed.stdout.split()[1]
    pulled = adverfine('pull', 'me/small', '--out', tmp_path/'there', '--revision', commit)
    assert pulled.returncode==0, pulled.stderr
    assert torch.equal(logits(load_compressed(tmp_path/'there')), logits(learn.model.eval()))
    wrong = adverfine('pull', 'me/none')
    assert wrong.returncode==2 and wrong.stderr.startswith('adverfine pull: me/none cannot be pulled')

def test_without_the_library_the_extra_is_named(learn, monkeypatch):
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(ImportError, match=r"adverfine\[hub\]"): from_hub('me/small')

def test_without_a_network_one_sentence_says_so(hub, learn, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.ENDPOINT', 'http://127.0.0.1:9')
    with pytest.raises(OSError, match='me/small cannot be pushed to .*look at name, revision and network'):
        learn.push_to_hub('me/small', token='secret')

def test_what_everybody_sees_is_not_private(hub, learn):
    learn.push_to_hub('me/small', token='secret')
    with pytest.raises(OSError, match='me/small is there already, and everybody sees it'):
        learn.push_to_hub('me/small', token='secret', private=True)
