"What is saved comes back bit by bit; what is damaged or hostile is refused with a message, and nothing in it runs"
import copy, json, os, random, sys
from functools import partial
import pytest, torch
from torch import nn
from fastai.learner import Learner
from adverfine.threat import pixel_space, PixelModel
from adverfine.files import write_atomic
from adverfine.networks.zoo import cnn8, resnet18_cifar
from adverfine.networks.modes import evaluating
from adverfine.data.images import image_dls
from adverfine.data.sources import cifar_vocab, digits_dls
from adverfine.deployment.checkpoint import _checksum, _sha, compressed_info, load_compressed
from adverfine.cli import main
import adverfine.compression.pruning, adverfine.compression.quantization  # noqa: F401 verbs of a Learner

dls = digits_dls(n_train=256)

def _learner(net, dls=dls):
    torch.manual_seed(0)
    return Learner(dls, net, loss_func=nn.CrossEntropyLoss())

def _cifar(n=8, **kw):
    g = torch.Generator().manual_seed(0)
    images = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, generator=g),torch.arange(n)%10
    return image_dls(images, images, vocab=cifar_vocab, bs=4, **kw)

def _same(learn, net):
    "Bit-identical on pixels, in eval mode"
    x = pixel_space(learn.dls).to_pixels(learn.dls.valid.one_batch()[0])
    with torch.no_grad(), evaluating(learn.model): want = pixel_space(learn.dls).wrap(learn.model)(x)
    assert not any(m.training for m in net.modules())
    with torch.no_grad(): return torch.equal(net(x), want)

def _stir(model):
    "Statistics and weights as training leaves them, not as they were initialised"
    torch.manual_seed(1)
    for k,v in model.state_dict().items():
        if v.is_floating_point(): v.mul_(1+.2*torch.rand_like(v)).add_(.01*torch.rand_like(v))
    return model

def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    f = tmp_path/'results.csv'
    write_atomic(f, 'old')
    def full(fd): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='No space'): write_atomic(f, 'new')
    assert f.read_text()=='old' and list(tmp_path.iterdir())==[f]

verbs = dict(dense=(), pruned=(('prune',.5),), bits8=(('quantize',8),), bits1=(('quantize',1),),
             both=(('prune',.3),('quantize',4)))

@pytest.mark.parametrize('verb', verbs)
@pytest.mark.parametrize('normalize', [None, (.5,.25)])
def test_logits_are_identical(tmp_path, verb, normalize):
    learn = _learner(_stir(cnn8(size=8)), digits_dls(n_train=256, normalize=normalize))
    for name,level in verbs[verb]: getattr(learn, name)(level)
    before = copy.deepcopy(learn.model.state_dict())
    states = torch.get_rng_state()
    learn.save_compressed(tmp_path)
    assert torch.equal(states, torch.get_rng_state()) and learn.model.training
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())
    net = load_compressed(tmp_path)
    assert _same(learn, net) and isinstance(net, PixelModel)==(normalize is not None)
    info = compressed_info(tmp_path)
    assert info['input_shape']==[1,8,8] and info['vocab']==list('0123456789') and info['report'] is None

@pytest.mark.parametrize('verb', ['dense', 'both'])
def test_residual_network(tmp_path, verb):
    learn = _learner(_stir(resnet18_cifar()), _cifar(normalize=((.49,.48,.45),(.25,.24,.26))))
    for name,level in verbs[verb]: getattr(learn, name)(level)
    learn.save_compressed(tmp_path)
    assert _same(learn, load_compressed(tmp_path))
    assert compressed_info(tmp_path)['vocab']==cifar_vocab

def test_depthwise_channels_of_a_torchvision_network(tmp_path):
    from torchvision.models import mobilenet_v2
    learn = _learner(_stir(mobilenet_v2(num_classes=10)), _cifar())
    with pytest.raises(ValueError, match='MobileNetV2 does not say how it was made'): learn.save_compressed(tmp_path)
    learn.prune(.25)
    learn.save_compressed(tmp_path, factory='torchvision.models.mobilenet_v2', num_classes=10)
    assert _same(learn, load_compressed(tmp_path))

def test_copies_remember_how_they_were_made(tmp_path):
    learn = _learner(cnn8(size=8))
    learn.model = copy.deepcopy(learn.model)
    learn.prune(.5).quantize(2)
    learn.save_compressed(tmp_path)
    again = _learner(load_compressed(tmp_path))       # a loaded network is one like any other
    again.quantize(8).save_compressed(tmp_path)
    assert _same(again, load_compressed(tmp_path))

def test_another_memory_format_is_not_another_network(tmp_path):
    learn = _learner(_stir(cnn8(size=8)))
    plain = copy.deepcopy(learn)
    learn.model.to(memory_format=torch.channels_last)
    assert not _same(learn, plain.model.eval())       # rounded otherwise, in the last bits
    learn.save_compressed(tmp_path)
    assert _same(plain, load_compressed(tmp_path))

def test_diverged_and_reported(tmp_path):
    learn = _learner(cnn8(size=8))
    learn.model[0].bias.data.fill_(float('nan'))
    learn.save_compressed(tmp_path, report={'robust': .5, 'left': {10: .1, 9: (1,2)}})
    assert load_compressed(tmp_path)(torch.rand(1, 1, 8, 8)).isnan().all()
    assert compressed_info(tmp_path)['report']=={'robust': .5, 'left': {'10': .1, '9': [1,2]}}
    with pytest.raises(ValueError, match='what JSON can hold'): learn.save_compressed(tmp_path, report=float('nan'))

def _small(width=8):
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(),
                         nn.Linear(width*36, 10))
def _other(): return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))

def test_ones_own_factory(tmp_path):
    learn = _learner(_stir(_small(12)))
    wide = partial(_small, 12)
    with pytest.raises(ValueError, match='functools.partial'): learn.save_compressed(tmp_path, factory=_small, width=12)
    learn.prune(.5)
    learn.quantize(8).save_compressed(tmp_path, factory=wide)
    assert _same(learn, load_compressed(tmp_path, factory=wide))
    with pytest.raises(ValueError, match="made by '_small', which is neither"): load_compressed(tmp_path)
    with pytest.raises(ValueError, match="factory= is '_other'"): load_compressed(tmp_path, factory=_other)
    _other.__name__ = '_small'
    try:
        with pytest.raises(ValueError, match="layer '1'"): load_compressed(tmp_path, factory=_other)
    finally: _other.__name__ = '_other'

def test_another_width_is_the_file_s_another_layer_is_refused(tmp_path):
    learn = _learner(nn.Sequential(nn.Flatten(), nn.LayerNorm(64), nn.Linear(64, 10)))
    def make(n=64, out=10, bias=True): return nn.Sequential(nn.Flatten(), nn.LayerNorm(n), nn.Linear(n, out, bias=bias))
    learn.save_compressed(tmp_path, factory=make)
    assert _same(learn, load_compressed(tmp_path, factory=make))
    assert _same(learn, load_compressed(tmp_path, factory=partial(make, 65))) # sizes are the file's, as after pruning
    with pytest.raises(ValueError, match=r"tensor '2.bias' is float32 \(10,\) in the file and missing"):
        load_compressed(tmp_path, factory=partial(make, bias=False))

def test_every_layer_that_pruning_cuts_can_be_saved(tmp_path):
    "One network with each kind of normalisation, PReLU, a transposed convolution and a scale that is nobody's layer"
    class Scale(nn.Module):
        def __init__(self, n): super().__init__(); self.gain = nn.Parameter(torch.rand(n, 1, 1))
        def forward(self, x): return x*self.gain
    def make():
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.PReLU(8),
            nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.InstanceNorm2d(8, affine=True), Scale(8),
            nn.ConvTranspose2d(8, 12, 2, stride=2), nn.GroupNorm(1, 12), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(),
            nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 10))
    learn = _learner(make())
    dense = {k: v.shape for k,v in learn.model.state_dict().items()}
    learn.prune(.5)
    cut = {k.split('.')[0] for k,v in learn.model.state_dict().items() if v.shape!=dense[k]}
    assert cut=={'0', '1', '2', '3', '4', '5', '6', '7', '10', '11', '13', '14', '15'}
    learn.save_compressed(tmp_path, factory=make)
    assert _same(learn, load_compressed(tmp_path, factory=make))
    learn.quantize(4).save_compressed(tmp_path, factory=make)
    assert _same(learn, load_compressed(tmp_path, factory=make))

def test_a_pruned_vision_learner(tmp_path):
    "fastai's head has BatchNorm1d and a pooling that concatenates"
    from fastai.vision.all import create_vision_model, resnet18, vision_learner
    dls = cifar10_like()
    learn = vision_learner(dls, resnet18, pretrained=False, normalize=False, loss_func=nn.CrossEntropyLoss())
    learn.prune(.5).quantize(8)
    def make(): return create_vision_model(resnet18, 10, pretrained=False)
    learn.save_compressed(tmp_path, factory=make)
    assert _same(learn, load_compressed(tmp_path, factory=make))

def cifar10_like():
    x,y = torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(0)),torch.arange(40)%10
    return image_dls((x, y), (x, y), bs=8)

def test_pruned_convnext(tmp_path):
    "torchvision's LayerNorm2d and its scales"
    from torchvision.models import convnext_tiny
    learn = Learner(cifar10_like(), convnext_tiny(num_classes=10), loss_func=nn.CrossEntropyLoss())
    learn.prune(.5)
    learn.save_compressed(tmp_path, factory='torchvision.models.convnext_tiny', num_classes=10)
    assert _same(learn, load_compressed(tmp_path))

def test_files_of_the_first_format_load(tmp_path):
    "Written before normalisation layers and loose tensors were described"
    learn = _learner(nn.Sequential(nn.Flatten(), nn.LayerNorm(64), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)))
    def make(): return nn.Sequential(nn.Flatten(), nn.LayerNorm(64), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    learn.prune(.5)
    learn.save_compressed(tmp_path, factory=make)
    record = json.loads((tmp_path/'model.json').read_text())
    del record['checksum'], record['loose'], record['layers']['1']
    (tmp_path/'model.json').write_text(json.dumps(dict(record, checksum=_checksum(record))))
    assert _same(learn, load_compressed(tmp_path, factory=make))

@pytest.mark.parametrize('make', [cnn8, resnet18_cifar])
@pytest.mark.parametrize('module', ['adverfine.models', 'adverfine.networks.zoo'])
def test_networks_are_found_by_their_old_names_and_their_new_ones(tmp_path, make, module):
    "A folder as a version has written it whose networks were in `adverfine.models`, and one as today"
    learn = _learner(_stir(cnn8(size=8))) if make is cnn8 else _learner(_stir(resnet18_cifar()), _cifar())
    learn.prune(.5).quantize(4)
    learn.save_compressed(tmp_path)
    record = compressed_info(tmp_path)
    assert record['factory']['factory']==f'adverfine.networks.zoo.{make.__name__}'
    record['factory']['factory'] = f'{module}.{make.__name__}'
    (tmp_path/'model.json').write_text(json.dumps(dict(record, checksum=_checksum(record)), indent=1))
    net = load_compressed(tmp_path)
    assert _same(learn, net)
    _learner(net, learn.dls).save_compressed(tmp_path/'again')        # by its new name
    assert compressed_info(tmp_path/'again')['factory']['factory']==f'adverfine.networks.zoo.{make.__name__}'

def test_a_network_changed_by_hand_is_not_saved(tmp_path):
    learn = _learner(cnn8(size=8))
    learn.model[1] = nn.Tanh()
    with pytest.raises(ValueError, match='changed after it was made'): learn.save_compressed(tmp_path/'x')
    learn = _learner(cnn8(size=8).half().float())
    learn.model[0].double()
    with pytest.raises(ValueError, match="tensor '0.weight' is float64"): learn.save_compressed(tmp_path/'x')
    assert not (tmp_path/'x').exists()

def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match='holds no model.json'): load_compressed(tmp_path/'nowhere')
    (tmp_path/'x.pth').write_bytes(b'')
    with pytest.raises(FileNotFoundError, match='holds no model.json'): load_compressed(tmp_path/'x.pth')
    _learner(cnn8(size=8)).save_compressed(tmp_path)
    next(tmp_path.glob('*.safetensors')).unlink()
    with pytest.raises(FileNotFoundError, match='copy the whole folder'): load_compressed(tmp_path)

@pytest.mark.parametrize('fails', [1, 3]) # of weights and of model.json; between them the folder is waited for
def test_a_full_disk_leaves_the_old_network(tmp_path, monkeypatch, fails):
    learn = _learner(_stir(cnn8(size=8)))
    learn.save_compressed(tmp_path)
    old = copy.deepcopy(learn)
    learn.quantize(8)
    real,calls = os.fsync,[]
    def full(fd):
        calls.append(fd)
        if len(calls)==fails: raise OSError(28, 'No space left on device')
        return real(fd)
    with monkeypatch.context() as m:
        m.setattr(os, 'fsync', full)
        with pytest.raises(OSError, match='No space'): learn.save_compressed(tmp_path)
    assert _same(old, load_compressed(tmp_path)) and not _same(learn, load_compressed(tmp_path))
    for o in ('', '.0123456789abcdef'): (tmp_path/f'.model-0123456789ab.safetensors{o}.part').write_bytes(b'killed')
    (tmp_path/'notes.txt').write_text('mine')
    learn.save_compressed(tmp_path)
    assert _same(learn, load_compressed(tmp_path))
    assert sorted(f.suffix for f in tmp_path.iterdir())==['.json', '.md', '.safetensors', '.txt']

# Mutants

seen,watching = [],False
_forbidden = {'os.system', 'os.exec', 'os.posix_spawn', 'os.fork', 'subprocess.Popen', 'pickle.find_class',
              'socket.connect', 'exec', 'compile', 'import'}
def _audit(event, args):
    if watching and event in _forbidden: seen.append((event, str(args)[:100]))
sys.addaudithook(_audit)

@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    "A pruned, quantized network behind a normalisation, saved; its files, and its logits for `x`"
    path = tmp_path_factory.mktemp('saved')
    learn = _learner(_stir(cnn8(size=8)), digits_dls(n_train=256, normalize=(.5,.25)))
    learn.prune(.8).quantize(4).save_compressed(path, report=dict(robust=.5))
    x = torch.rand(4, 1, 8, 8)
    with torch.no_grad(): return path,{f.name: f.read_bytes() for f in path.iterdir()},x,load_compressed(path)(x)

def _load_watched(path):
    "The network or the error that loading ends with; fails if anything ran or the error is of another type"
    global watching
    seen.clear(); watching = True
    try: return load_compressed(path)
    except (ValueError, OSError) as e:
        assert str(path) in str(e)
        return e
    finally:
        watching = False
        assert not seen, seen

def test_the_watch_sees_code_run(monkeypatch, tmp_path):
    for run in (lambda path: eval('1'), lambda path: os.system('true'), lambda path: __import__('this_is_not_there')):
        monkeypatch.setitem(globals(), 'load_compressed', run)
        with pytest.raises(AssertionError): _load_watched(tmp_path)

def _write(path, files):
    for f in path.iterdir(): f.unlink()
    for name,content in files.items(): (path/name).write_bytes(content)

def _mutate(rng, data):
    "Flip, cut, repeat, insert or drop some bytes"
    i,kind = rng.randrange(len(data)),rng.choice('flip cut repeat insert drop grow'.split())
    if kind=='flip':   return data[:i] + bytes([data[i]^(1<<rng.randrange(8))]) + data[i+1:]
    if kind=='cut':    return data[:i]
    if kind=='repeat': return data[:i] + data[max(0, i-50):]
    if kind=='insert': return data[:i] + rng.choice([b' ', b'0', b'"', b'[', b'\xff', b'\x00']) + data[i:]
    if kind=='drop':   return data[:i] + data[i+rng.randrange(1, 9):]
    return data + rng.randbytes(9)

@pytest.mark.parametrize('suffix', ['.json', '.safetensors'])
def test_random_mutants_are_refused(saved, tmp_path, suffix):
    _,files,x,logits = saved
    name = next(o for o in files if o.endswith(suffix))
    rng,refused = random.Random(0),0
    for _ in range(150):
        _write(tmp_path, dict(files, **{name: _mutate(rng, files[name])}))
        net = _load_watched(tmp_path)
        if isinstance(net, Exception): refused += 1
        else:
            with torch.no_grad(): assert torch.equal(net(x), logits)
    assert refused>=(130 if suffix=='.json' else 149)

def _rehashed(files, record, weights=None):
    "The files with every sum made right again, as an adversary would"
    if weights is None: weights = next(v for k,v in files.items() if k.endswith('.safetensors'))
    else: record['weights'] = dict(sha256=_sha(weights), bytes=len(weights))
    sha = record['weights'].get('sha256') if isinstance(record.get('weights'), dict) else ''
    return {'model.json': json.dumps(dict(record, checksum=_checksum(record))).encode(),
            f"model-{str(sha)[:12].replace('/', '')}.safetensors": weights}

def test_a_harmless_looking_edit_is_noticed(saved, tmp_path):
    text = saved[1]['model.json']
    for old,new in [(b'"robust": 0.5', b'"robust": 0.9'), (b'0.25', b'0.26'), (b'"size": 8', b'"size": 7')]:
        assert text.count(old)==1
        _write(tmp_path, dict(saved[1], **{'model.json': text.replace(old, new)}))
        assert 'checksum' in str(_load_watched(tmp_path))

def test_torchvision_is_asked_for_no_weights(tmp_path):
    from torchvision.models import squeezenet1_1
    learn = _learner(squeezenet1_1(num_classes=10), _cifar())
    name = 'torchvision.models.squeezenet1_1'
    learn.save_compressed(tmp_path, factory=name, num_classes=10)
    files,record = {f.name: f.read_bytes() for f in tmp_path.iterdir()},compressed_info(tmp_path)
    for kw in (dict(weights='DEFAULT'), dict(pretrained=True), dict(progress=True)):
        with pytest.raises(ValueError, match='not among those'):
            learn.save_compressed(tmp_path, factory=name, num_classes=10, **kw)
        made = dict(factory=name, kwargs=dict(num_classes=10, **kw))
        _write(tmp_path, _rehashed(files, dict(record, factory=made)))
        assert 'not among those' in str(_load_watched(tmp_path))

def test_the_sums_are_right_again(saved, tmp_path):
    _,files,x,logits = saved
    record = compressed_info(saved[0])
    _write(tmp_path, _rehashed(files, record))
    with torch.no_grad(): assert torch.equal(_load_watched(tmp_path)(x), logits)

def test_random_weights_files_with_right_sums(saved, tmp_path):
    _,files,x,_ = saved
    good,rng = next(v for k,v in files.items() if k.endswith('.safetensors')),random.Random(1)
    header = 8+int.from_bytes(good[:8], 'little')
    for _ in range(150):       # the values themselves may be any, so the header is what is mutated
        bad = _mutate(rng, good[:header])+good[header:]
        _write(tmp_path, _rehashed(files, compressed_info(saved[0]), bad))
        net = _load_watched(tmp_path)
        if not isinstance(net, Exception): assert net(x).shape==(4,10)

def _set(*keys_and_value):
    *keys,last,value = keys_and_value
    def change(record):
        for k in keys: record = record[k]
        if value is KeyError: del record[last]
        else: record[last] = value
    return change

huge = 10**12
def _factory(name, kwargs): return _set('factory', dict(factory=name, kwargs=kwargs))

hostile = [_set('factory', 'factory', o) for o in (
    'os.system', 'builtins.eval', 'subprocess.Popen', 'torchvision.models.get_model',
    'torchvision.models.resnet18.__init__', 'torchvision.models.os.system',
    'torchvision.models.segmentation.fcn_resnet50',
    'adverfine.models.adopt', 'adverfine.models', 'adverfine.networks.zoo.wraps', 'adverfine.networks.zoo', 'cnn8',
    '', '.', '\ud800', None, 7, ['adverfine.models.cnn8'], {}, 'torchvision.models.resnet18')]
hostile += [_set('factory', 'kwargs', o) for o in (
    None, 7, [], 'size', dict(size='8'), dict(size=-8), dict(size=0), dict(size=huge), dict(size=10**30),
    dict(size=8.5), dict(size=None), dict(size=[8]), dict(size=True), dict(weights='DEFAULT'), dict(size=8, n_out=-1),
    dict(size=8, n_out=huge), dict(size=8, in_channels=huge), dict(size=8, in_channels=3),
    {'__class__': 'os.system'}, {'factory': 'os.system'}, {'self': 1})]
hostile += [_factory('torchvision.models.resnet18', o) for o in (
    dict(pretrained=True), dict(weights='DEFAULT'), dict(progress=True), dict(num_classes=huge), dict(num_classes='7'),
    dict(norm_layer='os.system'), dict(num_classes=10))]
hostile += [_set('layers', '2', k, o) for k in ('in_channels', 'out_channels', 'groups')
            for o in (-1, 0, huge, 10**30, '6', 6.0, None, True, [6], 2, KeyError)]
hostile += [_set('layers', '2', 'type', o)
            for o in ('os.system', 'Linear', 'Conv2d', 'QuantLinear', None, ['QuantConv2d'], KeyError)]
_settings = dict(bits=(5, 0, -1, huge, 4.0, '4', True, None, KeyError), signed=(1, 'yes', None, KeyError),
                 through=('os.system', KeyError), lo=(-8,))
hostile += [_set('layers', '2', q, k, o)
            for q in ('w_quant', 'x_quant') for k,values in _settings.items() for o in values]
hostile += [_set('layers', '2', 'w_quant', o) for o in (None, [], 'Quantizer', KeyError)]
hostile += [_set('layers', '2', 'z_quant', {})]
hostile += [_set('layers', k, o) for k,o in (
    ('2', KeyError), ('2', None), ('2', []), ('1', dict(type='Conv2d')),
    ('forward', dict(type='Linear', in_features=1, out_features=1)), ('__class__', {}))]
hostile += [_set('loose', o) for o in (None, 7, [], 'x', {'x': [1]}, {'0.weight': [1]}, {'0': 1}, {'': []})]
hostile += [_set('normalize', o) for o in (
    None, 7, [7], [{}], [dict(mean=[.5])], [dict(mean=['x'], std=[1])], [dict(mean=[.5], std=[0])],
    [dict(mean=[float('nan')], std=[1])], [dict(mean=[float('inf')], std=[1])], [dict(mean=[.5]*7, std=[.5]*7)],
    [dict(mean=[10**400], std=[1])])]
hostile += [_set('input_shape', o) for o in (
    None, [], [1], [1,8], [3,8,8], [1,-8,8], [1,huge,huge], [1,'8',8], 'abc', [1,8,8,8], [0,8,8], {}, KeyError)]
hostile += [_set('weights', 'sha256', o) for o in ('', '../../../etc/passwd', '0'*64, None, 7, 'g'*64, KeyError)]
hostile += [_set('weights', 'bytes', o) for o in (0, -1, huge, '1', None, KeyError)]
hostile += [_set('weights', o) for o in (None, [], 'x', KeyError)]
hostile += [_set(k, KeyError) for k in ('factory', 'layers', 'normalize', 'format')]
hostile += [_set('format', o) for o in (2, '1', None)]

# The sizes of layers are what counts, and nothing here is executed: these describe the same network
harmless = [dict(size=-8), dict(size=0), dict(size=True), dict(size=8, n_out=huge), dict(size=8, in_channels=huge),
            dict(size=8, in_channels=3)]

@pytest.mark.filterwarnings('ignore:Initializing zero-element')
def test_hostile_descriptions_with_right_sums(saved, tmp_path):
    _,files,x,logits = saved
    loaded = []
    for change in hostile:
        record = compressed_info(saved[0])
        change(record)
        _write(tmp_path, _rehashed(files, record))
        net = _load_watched(tmp_path)
        if isinstance(net, Exception): continue
        with torch.no_grad(): assert torch.equal(net(x), logits), record
        loaded.append(record['factory']['kwargs'])
    assert loaded==harmless

def test_files_that_are_no_description(tmp_path, saved):
    for bad in (b'', b'null', b'[]', b'7', b'"x"', b'['*10**6, b'{"a":'*10**5, b'\x80\x04.', b'9'*10**5, b'{}',
                b'\xff\xfe\x00', b'NaN', b'{"checksum": null}'):
        _write(tmp_path, dict(saved[1], **{'model.json': bad}))
        assert isinstance(_load_watched(tmp_path), ValueError)

def test_tensors_of_another_kind(saved, tmp_path):
    from safetensors.torch import load, save
    good = load(next(v for k,v in saved[1].items() if k.endswith('.safetensors')))
    first = next(iter(good))
    for bad in (dict(good, extra=torch.ones(3)), {k: v for k,v in good.items() if k!=first},
                dict(good, **{first: good[first].double()}), dict(good, **{first: good[first][None]}),
                {}, {k.upper(): v for k,v in good.items()}):
        _write(tmp_path, _rehashed(saved[1], compressed_info(saved[0]), save(bad)))
        refusal = _load_watched(tmp_path)
        assert isinstance(refusal, ValueError) and 'tensor ' in str(refusal)

def test_evaluate_names_the_wrong_data_set(tmp_path, capsys):
    _learner(cnn8(3, size=32), _cifar()).save_compressed(tmp_path/'small')
    assert main(['evaluate', str(tmp_path/'small'), '--data', 'digits', '--eps', '0.1'])==2
    assert 'is for images of shape (3, 32, 32), and those of digits have (1, 8, 8)' in capsys.readouterr().err

def attentive():
    encoder = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, dropout=0.)
    return nn.Sequential(nn.Flatten(2), nn.Linear(64, 32), encoder, nn.Flatten(), nn.Linear(32, 10))

def test_attention_is_described_by_its_heads(tmp_path):
    learn = _learner(attentive())
    learn.prune(.5).save_compressed(tmp_path, factory=attentive)
    assert _same(learn, load_compressed(tmp_path, attentive))
    files = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    said = compressed_info(tmp_path)['layers']['2.self_attn']
    assert said==dict(type='SelfAttention', num_heads=2)
    for odd in (dict(num_heads=0), dict(num_heads=-2), dict(num_heads='2'), dict(num_heads=2.), dict(num_heads=True),
                dict(num_heads=None), dict(type='Linear'), dict(more=1)):
        record = json.loads(files['model.json'])
        record.pop('checksum')
        record['layers']['2.self_attn'].update(odd)
        _write(tmp_path, _rehashed(files, record))
        why = 'an attention, and described by' if 'type' not in odd else "layer '2.self_attn'"
        with pytest.raises(ValueError, match=why): load_compressed(tmp_path, attentive)

def test_sizes_that_are_no_numbers_are_named(saved, tmp_path):
    for size in (0, -1, '6', 6., True, None, [6]):
        record = compressed_info(saved[0])
        record['layers']['2']['out_channels'] = size
        _write(tmp_path, _rehashed(saved[1], record))
        assert 'and no positive whole number' in str(_load_watched(tmp_path))
