"Artifacts are the fake-quantized network: integers, ONNX, PyTorch's integer kernels"
from functools import partial
import pytest, torch
from torch import nn
from fastai.vision.all import Learner
from adverfine.threat import pixel_space
from adverfine.networks.zoo import cnn8, resnet18_cifar
from adverfine.data.images import image_dls
from adverfine.data.pixels import pixels
from adverfine.data.sources import digits_dls
from adverfine.attacks.gradient import PGD
from adverfine.attacks.square import Square
from adverfine.compression.pruning import prune
from adverfine.compression.quantization import QuantBatchNorm2d, quantize
from adverfine.evaluation.robustness import evaluate
from adverfine.deployment.checkpoint import compressed_info, load_compressed
from adverfine.deployment.integer import check_agreement, integer_network, IntegerConv2d, IntegerLinear
from adverfine.deployment import onnx as onnx_room
from adverfine.deployment.onnx import OnnxNetwork, to_onnx
from adverfine.deployment.lowered import lower
from adverfine.training.recipes import compress
import fastai.callback.progress, fastai.callback.schedule  # noqa: F401 verbs of a Learner

def _net(x, seed=0):
    "Every kind of neighbourhood: BatchNorm or not, negative scales, a bias or none, groups, signed inputs, a sum"
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.an = nn.Conv2d(x.shape[1], 8, 3, padding=1, bias=False),nn.BatchNorm2d(8)
            self.b,self.bn = nn.Conv2d(8, 8, 3, padding=1, groups=4),nn.BatchNorm2d(8)
            self.c,self.d = nn.Conv2d(8, 4, 3, stride=2, padding=1),nn.Linear(4*(x.shape[2]//2)**2, 10, bias=False)
        def forward(self, x):
            x = self.an(self.a(x)).relu()
            x = self.bn(self.b(x)) + x
            return self.d(self.c(x).flatten(1))
    torch.manual_seed(seed)
    net = Net()
    for n in (net.an, net.bn): nn.init.uniform_(n.weight, -1, 1); nn.init.normal_(n.bias)
    for _ in range(5): net(x)
    return net.eval()

@pytest.mark.parametrize('bits', [8, 4, (1, 8), (8, 1), (3, 2), 1])
@pytest.mark.parametrize('sums', [False, True, 4])
def test_integers_are_the_fake_quantized_network(bits, sums):
    torch.manual_seed(1)
    x = torch.randn(32, 2, 8, 8)
    fake = _net(x)
    quantize(fake, bits, [x], sums=sums)
    integers = integer_network(fake)
    layers = [m for m in integers.modules() if isinstance(m, (IntegerConv2d, IntegerLinear))]
    assert len(layers)==4 and all(m.codes.dtype==torch.int8 for m in layers)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in integers.modules())
    with torch.no_grad():
        assert (integers(x)-fake(x)).norm() <= .03*fake(x).norm()
        m = fake.c                  # without a BatchNorm, layer by layer it is exact but for the order of sums
        torch.testing.assert_close(integers.c(x.repeat(1, 4, 1, 1)), m(x.repeat(1, 4, 1, 1)), rtol=1e-4, atol=1e-4)

def test_folding_is_exact_where_nothing_rounds_differently():
    torch.manual_seed(0)
    conv,norm = nn.Conv2d(3, 6, 3),nn.BatchNorm2d(6)
    nn.init.uniform_(norm.weight, -1, 1); norm.weight.data[0] = 0; nn.init.normal_(norm.bias)
    net,x = nn.Sequential(conv, norm),torch.rand(16, 3, 8, 8)
    net(x); net.eval()
    quantize(net, 4, [x])
    torch.testing.assert_close(integer_network(net)(x), net(x), rtol=1e-4, atol=1e-5)

def test_a_network_that_cannot_be_traced_keeps_its_norms():
    class Branching(nn.Sequential):
        def forward(self, x): return super().forward(x) if x.sum()>0 else x
    net = Branching(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10)).eval()
    x = torch.rand(4, 1, 8, 8)
    quantize(net, 8, [x])
    integers = integer_network(net)
    assert isinstance(integers[1], nn.BatchNorm2d)
    torch.testing.assert_close(integers(x), net(x), rtol=1e-2, atol=1e-3)

def test_refusals():
    net,x = cnn8(size=8),torch.rand(4, 1, 8, 8)
    with pytest.raises(ValueError, match='call quantize first'): integer_network(net)
    quantize(net, 8, [x], layers={'2': 16})
    with pytest.raises(ValueError, match="layer '2' has 16 bits"): integer_network(net)
    residual,images = resnet18_cifar().eval(),torch.rand(4, 3, 32, 32)
    quantize(residual, 16, [images], layers={'*': 8})
    with pytest.raises(ValueError, match='quantize with sums=8'): integer_network(residual)
    circular = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, padding_mode='circular'), nn.Flatten(), nn.Linear(256, 10))
    quantize(circular, 8, [x])
    with pytest.raises(ValueError, match="layer '0' pads with 'circular'"): integer_network(circular)

@pytest.fixture
def learn():
    torch.manual_seed(0)
    learn = Learner(digits_dls(normalize=(.5, .5)), cnn8(size=8))
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(4, 5e-3)
    learn.prune(.5).quantize(8)
    return learn

def test_onnx_takes_pixels_and_any_number_of_them(learn, tmp_path):
    pytest.importorskip('onnxruntime')
    import onnx
    flags = {n: m.training for n,m in learn.model.named_modules()}
    file = learn.export_onnx(tmp_path/'net.onnx')
    assert flags=={n: m.training for n,m in learn.model.named_modules()}
    x,y = pixels(learn.dls.test)
    artifact,fake = OnnxNetwork(file),pixel_space(learn.dls).wrap(learn.model.eval())
    for n in (1, 7, 500): assert (artifact(x[:n]).argmax(1)==fake(x[:n]).argmax(1)).float().mean()>=.99
    ops = [o.op_type for o in onnx.load(file).graph.node]
    assert ops.count('Conv')==6 and ops.count('QuantizeLinear')==8
    assert not any(o.metadata_props or o.doc_string for o in onnx.load(file).graph.node)

def test_openvino_decides_as_the_network_does(learn, tmp_path):
    pytest.importorskip('onnxruntime')
    openvino = pytest.importorskip('openvino')
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(learn.export_onnx(tmp_path/'net.onnx')), 'CPU')
    x,_ = pixels(learn.dls.test)
    fake = pixel_space(learn.dls).wrap(learn.model.eval())
    assert (torch.from_numpy(compiled(x.numpy())[0]).argmax(1)==fake(x).argmax(1)).float().mean()>=.99

def test_an_artifact_that_decides_otherwise_is_not_written(learn, tmp_path, monkeypatch):
    pytest.importorskip('onnxruntime')
    file = tmp_path/'net.onnx'
    file.write_bytes(b'old')
    class Wrong(OnnxNetwork):
        def __call__(self, x): return super().__call__(x).roll(1, 1)
    monkeypatch.setattr(onnx_room, 'OnnxNetwork', Wrong)
    with pytest.raises(ValueError, match='99.5% are needed: nothing was written'): learn.export_onnx(file)
    assert file.read_bytes()==b'old' and list(tmp_path.iterdir())==[file]

def test_networks_that_read_their_own_weights_are_exported():
    pytest.importorskip('onnxruntime')
    class Reads(nn.Module):
        def __init__(self): super().__init__(); self.conv,self.head = nn.Conv2d(1, 4, 3),nn.Linear(4, 10)
        def forward(self, x): return self.head(self.conv(x.to(self.conv.weight.dtype)).mean((2, 3)))
    net,x = Reads(),torch.rand(8, 1, 8, 8)
    quantize(net, 8, [x])
    assert (OnnxNetwork(to_onnx(net, (1, 8, 8)))(x)-net(x)).norm()<.02*net(x).norm()

def test_files_that_are_no_networks(tmp_path):
    pytest.importorskip('onnxruntime')
    (tmp_path/'junk.onnx').write_bytes(b'junk'*100)
    with pytest.raises(FileNotFoundError, match='none.onnx is not there'): OnnxNetwork(tmp_path/'none.onnx')
    with pytest.raises(ValueError, match='cannot load .*junk.onnx'): OnnxNetwork(tmp_path/'junk.onnx')
    small = OnnxNetwork(to_onnx(cnn8(size=8), (1, 8, 8)))
    with pytest.raises(ValueError, match=r'takes images of shape \(1, 8, 8\), and these have \(1, 9, 9\)'):
        small(torch.rand(2, 1, 9, 9))

def test_a_network_that_cannot_be_exported_says_why():
    pytest.importorskip('onnxscript')
    class Asks(nn.Module):
        def __init__(self): super().__init__(); self.head = nn.Linear(64, 10)
        def forward(self, x): return self.head(x.flatten(1)) if x.mean()>0 else x.flatten(1)[:,:10]
    with pytest.raises(ValueError, match=r'PyTorch cannot export Asks \(.*data-dependent'): to_onnx(Asks(), (1, 8, 8))

def test_missing_packages_are_named(learn, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_room, 'find_spec', lambda o: None)
    with pytest.raises(ImportError, match=r"pip install 'adverfine\[onnx\]'"): learn.export_onnx(tmp_path/'net.onnx')
    with pytest.raises(ImportError, match=r"pip install 'adverfine\[int8\]'"):
        lower(learn.model, torch.rand(2, 1, 8, 8))

def test_robustness_of_the_artifact_crafts_on_the_fake_quantized_network(learn):
    pytest.importorskip('onnxruntime')
    x,y = (o[:64] for o in pixels(learn.dls.test))
    fake = pixel_space(learn.dls).wrap(learn.model.eval())
    artifact = OnnxNetwork(to_onnx(fake, (1, 8, 8)))
    report = evaluate(artifact, x, y, [PGD(.1, steps=5), Square(.1, queries=50)], fake_quantized=fake, progress=False)
    mine = evaluate(fake, x, y, [PGD(.1, steps=5), Square(.1, queries=50)], progress=False)
    assert abs(report.clean-mine.clean)<=1/64 and abs(report.robust-mine.robust)<=3/64
    assert set(report.robust_after)==set(mine.robust_after)

def test_robustness_of_what_is_deployed_is_that_of_the_artifact(learn):
    """A deployed network that is right for no image has no accuracy, whatever the fake-quantized one says;
    Square is added where no attack asks the deployed network alone"""
    never = lambda x: -learn.model(x).detach()
    assert learn.robustness(PGD(.1, steps=2), n=20, deployed=never, progress=False).clean<.2
    right = lambda x: pixel_space(learn.dls).wrap(learn.model)(x).detach()
    report = learn.robustness(PGD(.1, steps=2), n=8, deployed=right, progress=False)
    assert [o for o in report.robust_after if not o.startswith('guard ')]==['PGD-2', 'Square']
    attacks = [PGD(.1, steps=2), Square(.1, queries=5)]
    report = learn.robustness(attacks, n=8, deployed=right, progress=False)
    assert [o for o in report.robust_after if not o.startswith('guard ')]==['PGD-2', 'Square']

@pytest.mark.skipif(not torch.backends.cpu.get_cpu_capability().startswith('AVX'), reason='integer kernels of x86')
def test_lowered_to_integer_kernels():
    pytest.importorskip('torchao')
    torch.manual_seed(0)
    x = torch.rand(64, 3, 32, 32)
    net = resnet18_cifar()
    for _ in range(3): net(x)
    prune(net, .5, x[:2])
    quantize(net.eval(), 8, [x])
    fast = lower(net, x, sizes=(), least=.9)
    kernels = [str(n.target) for n in fast.graph.graph.nodes if n.op=='call_function']
    assert sum('qconv' in o for o in kernels)==20 and not any('aten.conv' in o for o in kernels)
    for n in (1, 5): assert fast(x[:n]).shape==(n, 10)

@pytest.mark.skipif(not torch.backends.cpu.get_cpu_capability().startswith('AVX'), reason='integer kernels of x86')
def test_lowered_and_compiled(learn, monkeypatch):
    "Compiled for the sizes asked for, with integer kernels; whatever memory format or grad mode the images have"
    pytest.importorskip('torchao')
    from torch._inductor.utils import run_and_get_code
    fake,x = learn.model.eval(),learn.dls.valid.one_batch()[0][:10]
    fast,code = run_and_get_code(lambda: lower(fake, x, sizes=(3,)))
    assert list(fast.compiled)==[3] and 'qconv' in ''.join(code) and 'qlinear' in ''.join(code)
    monkeypatch.setattr(fast, 'graph', None)
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters['stats']['unique_graphs']
    for images in x[:3], x[3:6].contiguous(memory_format=torch.channels_last), x[:3].clone().requires_grad_():
        assert (fast(images).argmax(1)==fake(images).argmax(1)).all()
    assert torch._dynamo.utils.counters['stats']['unique_graphs']==before     # what is deployed is never compiled anew

def test_without_a_compiler_the_kernels_run_one_by_one(learn, monkeypatch):
    pytest.importorskip('torchao')
    def no_compiler(*args, **kw): raise RuntimeError('no C++ compiler found')
    monkeypatch.setattr(torch, 'compile', no_compiler)
    x = learn.dls.valid.one_batch()[0][:10]
    with pytest.warns(UserWarning, match='no C\\+\\+ compiler found'):
        fast = lower(learn.model, x, sizes=(3,), least=.9)
    assert not fast.compiled and fast(x[:3]).shape==(3, 10)
    with pytest.raises(ValueError, match='0 is not a number of images'): lower(learn.model, x, sizes=(0,))

def test_sums_are_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    train = torch.rand(40, 3, 32, 32),torch.arange(40)%10
    test = torch.rand(8, 3, 32, 32),torch.arange(8)
    learn = Learner(image_dls(train, test, bs=16), resnet18_cifar())
    learn.quantize(4, n_batches=1)
    learn.save_compressed(tmp_path)
    x,again = torch.rand(3, 3, 32, 32),load_compressed(tmp_path)
    assert isinstance(again.layer1[0].bn2, QuantBatchNorm2d)
    with torch.no_grad(): assert torch.equal(again(x), learn.model.eval()(x))

def test_compress_keeps_the_normalisation(tmp_path):
    torch.manual_seed(0)
    learn = Learner(digits_dls(normalize=(.4, .3)), cnn8(size=8))
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(4, 5e-3)
    learn.save_compressed(tmp_path/'net')
    report = compress(tmp_path/'net', tmp_path/'small', digits_dls, bits=8, epochs=0, eps=.05, adversarial=False,
                      progress=False, escalate=False)
    small,whole = compressed_info(tmp_path/'small'),compressed_info(tmp_path/'net')
    assert small['normalize']==whole['normalize']!=[] and small['report']['clean']==report.clean
    x,y = pixels(learn.dls.test)
    assert ((load_compressed(tmp_path/'small')(x).argmax(1)==y).float().mean()-report.clean).abs()<1e-6
    assert 'normalises them itself' in (tmp_path/'small'/'README.md').read_text()
    again = compress(tmp_path/'net', tmp_path/'both', digits_dls, prune=.5, bits=(4, 8), epochs=1, eps=.05,
                     progress=False, escalate=False)
    assert load_compressed(tmp_path/'both')(x).shape==(500, 10) and again.n==500

def test_compress_cuts_nine_tenths_while_it_trains(tmp_path, monkeypatch):
    from adverfine.training import recipes
    torch.manual_seed(0)
    learn = Learner(digits_dls(n_train=200), cnn8(size=8))
    learn.save_compressed(tmp_path/'net')
    cut = []
    monkeypatch.setattr(recipes, '_at_once', lambda learn, prune, bits: cut.append(prune) or learn.prune(prune))
    def sizes(**kwargs):
        data = partial(digits_dls, n_train=200)
        compress(tmp_path/'net', tmp_path/'small', data, prune=.9, progress=False, **kwargs)
        layers = compressed_info(tmp_path/'small')['layers'].values()
        return [o['out_channels'] for o in layers if 'out_channels' in o],all('w_quant' in o for o in layers)
    at_once,_ = sizes(epochs=0)
    assert cut==[.9]
    for how in dict(adversarial=False), dict(eps=.1, n=20, escalate=False):
        assert sizes(epochs=2, bits=8, **how)==(at_once, True)
    assert cut==[.9]

# --- what agreement means

def _decides(n, odd, lead):
    "Images, a network that is sure of class 0, and an artifact that prefers class 1 on `odd` of them, `lead` below"
    x = torch.zeros(n, 1, 1, 1)
    ours = torch.tensor([2., 1., 0.]).repeat(n, 1)
    ours[:odd,1] = 2-lead
    theirs = ours.clone()
    theirs[:odd] = theirs[:odd][:,[1,0,2]]
    logits = dict(ours=iter(ours.split(64)), theirs=iter(theirs.split(64)))
    return x,lambda x: next(logits['ours']),lambda x: next(logits['theirs'])

@pytest.mark.parametrize('n,odd,lead,fine', [
    (173, 1, 1., True), (173, 2, 1., False), (173, 9, .02, True), (1000, 5, 1., True), (1000, 6, 1., False),
    (26, 1, 1., True), (26, 2, 1., False)])
def test_near_ties_and_single_images_do_not_refuse_an_artifact(n, odd, lead, fine):
    x,fake,artifact = _decides(n, odd, lead)
    if fine: assert check_agreement(artifact, fake, x)==pytest.approx(1-odd/n)
    else:
        with pytest.raises(ValueError, match='near-ties aside'): check_agreement(artifact, fake, x)

def test_logits_that_are_no_numbers_disagree():
    x,fake,_ = _decides(100, 0, 1.)
    def broken(x): return torch.full((len(x), 3), float('nan')).roll(1, 1).index_fill(1, torch.tensor(0), 0.)
    with pytest.raises(ValueError, match="chooses the fake-quantized network's class .* near-ties aside"):
        check_agreement(broken, fake, x)
