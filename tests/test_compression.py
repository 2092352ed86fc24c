"Pruning and quantization: the optimizer follows, nothing frozen thaws, gradients are what the formula says"
import copy
from functools import partial
import pytest, torch, torchvision
from torch import nn
from fastai.vision.all import Learner, SGD, Adam, OptimWrapper
from adverfine.networks.zoo import cnn8, resnet18_cifar
from adverfine.networks.attention import SelfAttention
from adverfine.networks.cost import cost, macs
from adverfine.data.pixels import training_batches
from adverfine.data.sources import digits_dls
from adverfine.attacks.gradient import PGD
from adverfine.compression.importance import Taylor
from adverfine.compression.plan import PruningPlan
from adverfine.compression.pruning import prune, StructuredPruning
from adverfine.compression.quantizers import calibrations, Quantizer
from adverfine.compression.quantization import QuantBatchNorm2d, quantize, QuantLinear
from adverfine.evaluation.metric import RobustAccuracy
from adverfine.deployment.checkpoint import load_compressed
from adverfine.training.acceleration import BF16
from adverfine.training.adversarial import AdversarialTraining
import fastai.callback.progress  # noqa: F401 verbs of a Learner

opts = dict(sgd=partial(SGD, mom=.9), adam=Adam,
            torch_sgd=partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9),
            torch_adam=partial(OptimWrapper, opt=torch.optim.Adam))

def _learner(opt='adam', net=None, **kw):
    torch.manual_seed(0)
    return Learner(digits_dls(n_train=256), net or cnn8(size=8), opt_func=opts[opt], **kw)

def _fit(learn, *args, **kw):
    with learn.no_bar(), learn.no_logging(): learn.fit(*args, **kw)

def _check_optimizer(learn):
    "Every trainable parameter is in the optimizer, nothing else is, and a step moves them all"
    mine = {id(p) for ps in learn.opt.param_lists for p in ps}
    assert mine=={id(p) for p in learn.model.parameters()}
    before = {n: p.detach().clone() for n,p in learn.model.named_parameters()}
    _fit(learn, 2, 1e-3)
    still = [n for n,p in learn.model.named_parameters() if torch.equal(p, before[n])]
    assert not still, still

@pytest.mark.parametrize('opt', opts)
def test_optimizer_follows(opt):
    learn = _learner(opt)
    _fit(learn, 1, 1e-3)
    learn.prune(.5)
    _check_optimizer(learn)
    learn.quantize(8)
    _check_optimizer(learn)
    learn.quantize(4)                    # a fake-quantized network can be given other bits
    _check_optimizer(learn)

@pytest.mark.parametrize('opt', opts)
def test_state_is_cut_like_the_weights(opt):
    learn = _learner(opt)
    _fit(learn, 1, 1e-3)
    states = learn.opt.opt.state if 'torch' in opt else learn.opt.state
    def shaped(p): return {k: v.clone() for k,v in states[p].items() if torch.is_tensor(v) and v.shape==p.shape}
    old = {n: (p.detach().clone(), shaped(p)) for n,p in learn.model.named_parameters()}
    assert all(s for _,s in old.values())
    learn.prune(.5)
    for n,p in learn.model.named_parameters():
        w,state = old[n]
        for k,v in state.items():
            new = states[p][k]
            assert new.shape==p.shape
            pairs = set(zip(w.flatten().tolist(), v.flatten().tolist()))
            # each weight keeps the state it had
            assert set(zip(p.flatten().tolist(), new.flatten().tolist())) <= pairs

def test_a_count_of_steps_is_no_state_of_a_weight():
    "PyTorch's Adam counts in a tensor without dimensions, which is the shape of a scalar parameter"
    class Gained(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv,self.head = nn.Conv2d(1, 8, 3),nn.Linear(8, 10)
            self.gain = nn.Parameter(torch.tensor(1.))
        def forward(self, x): return self.gain*self.head(self.conv(x).mean((2,3)))
    learn = _learner('torch_adam', Gained())
    _fit(learn, 1, 1e-3)
    learn.prune(.5)
    assert learn.model.conv.out_channels==4
    _check_optimizer(learn)

def test_residual_network():
    x = torch.rand(2, 3, 32, 32)
    net = resnet18_cifar()
    net.layer1.eval(); net.conv1.weight.requires_grad_(False); net.fc.bias.requires_grad_(False)
    flags = {n: m.training for n,m in net.named_modules()}
    frozen = {n for n,p in net.named_parameters() if not p.requires_grad}
    before = cost(net, x).macs
    prune(net, .5, x)
    assert cost(net, x).macs <= .3*before and net.fc.out_features==10
    assert flags=={n: m.training for n,m in net.named_modules()}
    assert frozen=={n for n,p in net.named_parameters() if not p.requires_grad}
    quantize(net, 4, [x])
    net(x).sum().backward()

def test_prune_refuses_and_changes_nothing():
    x = torch.rand(2, 1, 8, 8)
    quantized = cnn8(size=8)
    quantize(quantized, 8, [x])
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 4, 3)), nn.Flatten(), nn.Linear(4*36, 10))
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    for net,share,why in [(quantized, .5, 'prune before quantizing'), (normed, .5, 'parametriz'),
                          (flat, .5, 'no prunable layers'), (cnn8(size=8), 0, 'share=0'),
                          (cnn8(size=8), .98, 'at most 0.968')]:
        shapes = [p.shape for p in net.parameters()]
        with pytest.raises(ValueError, match=why): prune(net, share, x)
        assert shapes==[p.shape for p in net.parameters()]
        assert all(p.requires_grad for p in net.parameters()) and all(m.training for m in net.modules())

def test_pruning_in_a_fit_reaches_its_share_with_one_epoch_and_with_many():
    for epochs in (1, 3):
        learn = _learner('sgd')
        _fit(learn, epochs, 1e-3, cbs=[StructuredPruning(.5), AdversarialTraining(PGD(.1, steps=1))])
        assert learn.model[0].out_channels==16
        _check_optimizer(learn)

@pytest.mark.parametrize('bits,signed,offset', [
    (8, True, 0), (4, False, 0), (2, True, 0), (1, True, .5), (1, False, 0)])
def test_gradients_are_the_formula(bits, signed, offset):
    torch.manual_seed(0)
    q = Quantizer(bits, signed)
    q.begin(torch.tensor(.1))
    x,grad = torch.randn(7, 50).mul(.1*2**bits).requires_grad_(),torch.randn(7, 50)
    out = q(x)
    gx,gs = torch.autograd.grad(out, [x, q.log_gain], grad)
    s,lo,hi = .1,q.lo,q.hi
    c = torch.round(x/s-offset).clamp(lo, hi)
    inside = (x/s-offset>=lo-.5) & (x/s-offset<=hi+.5)
    torch.testing.assert_close(out, (c+offset)*s)
    torch.testing.assert_close(gx, grad*inside)
    torch.testing.assert_close(gs, (grad*((c+offset)-inside*x/s)*s).sum()/50**q.tempering, rtol=1e-4, atol=1e-4)
    assert len(out.unique())<=2**bits

def test_a_fake_quantized_network_keeps_its_state_dict():
    x = torch.rand(8, 1, 8, 8)
    a,b = cnn8(size=8),cnn8(size=8)
    quantize(a, 4, [x]); quantize(b, 4, [x*.5])
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(x), b(x))

def test_calibration_is_on_training_images_only():
    seen = []
    learn = _learner()
    class Spy(nn.Module):
        def forward(self, x): seen.append(x.clone()); return x
    learn.model = nn.Sequential(Spy(), *learn.model)
    learn.quantize(4)
    train = {im.numpy().tobytes() for im in learn.dls.train.dataset.x}
    assert seen and all(im.numpy().tobytes() in train for x in seen for im in x)

@pytest.mark.parametrize('bits', [16, 8, 4, 3, 2, 1])
def test_adversarial_fine_tuning_of_a_fake_quantized_network(bits):
    learn = _learner(metrics=RobustAccuracy(PGD(.1, steps=2)))
    learn.quantize(bits)
    _fit(learn, 1, 1e-3, cbs=[AdversarialTraining(PGD(.1, steps=2)), BF16()])
    assert all(p.isfinite().all() for p in learn.model.parameters())

_pictures = lambda size=64: torch.rand(2, 3, size, size)

@pytest.mark.parametrize('name,kw', [
    ('resnet18', dict(keep_macs=.25)), ('mobilenet_v3_small', dict(keep_macs=.25, scope='global', criterion='bn')),
    ('regnet_y_400mf', dict(keep_macs=.3)), ('squeezenet1_1', dict(keep_macs=.5, round_to=8))])
def test_macs_are_what_was_asked_for(name, kw):
    torch.manual_seed(0)
    net,x = torchvision.models.get_model(name, weights=None, num_classes=10),_pictures()
    before = macs(net, x)
    prune(net, None, x, **kw)
    assert abs(macs(net, x)/before-kw['keep_macs'])<=.02
    assert net(x).shape==(2, 10)
    net(x).sum().backward()

def test_a_transformer_keeps_its_stream_and_loses_of_its_mlps_and_heads():
    net = torchvision.models.VisionTransformer(32, 8, 2, 4, 48, 96, num_classes=10)
    prune(net, .5, _pictures(32))
    assert [m.out_features for n,m in net.named_modules() if isinstance(m, nn.Linear) and '.mlp' in n]==[48, 48]*2
    assert [o.self_attention.num_heads for o in net.encoder.layers]==[2, 2]
    assert net(_pictures(32)).shape==(2, 10)

def _vit(**kw): return torchvision.models.VisionTransformer(8, 4, 2, 4, 32, 48, num_classes=10, **kw)

class TimmAttention(nn.Module):
    "Attention as timm writes it: reshapes by its own number of heads"
    def __init__(self, dim, heads):
        super().__init__()
        self.num_heads,self.head_dim,self.attn_dim = heads,dim//heads,dim
        self.qkv,self.proj = nn.Linear(dim, 3*dim),nn.Linear(dim, dim)
    def forward(self, x):
        q,k,v = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        out = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.proj(out.reshape(*x.shape[:2], self.attn_dim))

class Attends(nn.Module):
    "Attention over the rows of an image"
    def __init__(self, attn): super().__init__(); self.attn,self.head = attn,nn.Linear(32, 10)
    def forward(self, x):
        x = x.flatten(1, 2)
        out = self.attn(x) if isinstance(self.attn, TimmAttention) else self.attn(x, x, x, need_weights=False)[0]
        return self.head((x+out).mean(1))

@pytest.mark.parametrize('attn', [
    lambda: TimmAttention(32, 4), lambda: nn.MultiheadAttention(32, 4, batch_first=True),
    lambda: nn.MultiheadAttention(32, 4, bias=False, batch_first=True)])
def test_heads_that_go_are_as_if_silenced(attn):
    torch.manual_seed(0)
    net,x = Attends(attn()).eval(),torch.rand(3, 1, 5, 32)
    whole = copy.deepcopy(net)
    prune(net, .5, x)
    assert net.attn.num_heads==2
    silenced = getattr(whole.attn, 'proj', None) or whole.attn.out_proj
    names = 'attn.qkv.weight','attn.in_proj_weight','attn.in_proj.weight'
    old,new = (next(p for n,p in m.named_parameters() if n in names)[:32] for m in (whole, net))
    kept = [i for i in range(4) if any(torch.equal(old[8*i:8*i+8], new[8*j:8*j+8]) for j in range(2))]
    assert len(kept)==2
    with torch.no_grad(): silenced.weight.view(32, 4, 8)[:,[i for i in range(4) if i not in kept]] = 0
    assert torch.allclose(net(x), whole(x), atol=1e-6)

def test_attention_over_shifted_windows_keeps_its_stream():
    net,x = torchvision.models.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [2, 2], num_classes=10),_pictures(32)
    prune(net, .5, x)
    assert [m.out_features for n,m in net.named_modules() if n.endswith('mlp.0')]==[32, 32, 64, 64]
    assert net(x).shape==(2, 10)

def test_one_head_stays():
    net,x = Attends(TimmAttention(32, 4)),torch.rand(3, 1, 5, 32)
    prune(net, .9, x)
    assert net.attn.num_heads==1 and net(x).shape==(3, 10)

@pytest.mark.parametrize('criterion', ['l1', 'l2', 'bn', 'random', 'taylor'])
@pytest.mark.parametrize('scope', ['uniform', 'global'])
def test_every_criterion_ranks_heads(criterion, scope):
    learn = _learner(net=nn.Sequential(nn.Conv2d(1, 3, 1), _vit()))
    learn.prune(.5, criterion=criterion, scope=scope)
    assert learn.model(torch.rand(2, 1, 8, 8)).shape==(2, 10)

def test_a_transformer_goes_through_everything(tmp_path):
    "Trained, pruned, quantized, trained again with its momentum, saved, loaded"
    factory = lambda: nn.Sequential(nn.Conv2d(1, 3, 1), _vit())
    learn = _learner(net=factory())
    _fit(learn, 1, 1e-3)
    attn = learn.model[1].encoder.layers[0].self_attention
    before,momentum = attn.in_proj_weight.detach().clone(),learn.opt.state[attn.in_proj_weight]['grad_avg']
    learn.prune(.5)
    weight = attn.in_proj.weight
    rows = [next(i for i,w in enumerate(before) if torch.equal(w, new)) for new in weight]
    assert len(rows)==48 and torch.equal(learn.opt.state[weight]['grad_avg'], momentum[rows])
    learn.quantize(8)
    assert isinstance(attn.in_proj, QuantLinear) and isinstance(attn.out_proj, QuantLinear)
    _check_optimizer(learn)
    learn.save_compressed(tmp_path, factory=factory)
    x = torch.rand(4, 1, 8, 8)
    with torch.no_grad(): assert torch.equal(load_compressed(tmp_path, factory)(x), learn.model.eval()(x))

def test_a_refused_transformer_keeps_its_attention():
    class Odd(nn.Module):
        def __init__(self): super().__init__(); self.vit = _vit()
        def forward(self, x):
            whole = self.vit.encoder.layers[0].mlp[0].out_features==48
            return self.vit(x)[:,torch.arange(10)] if whole else 1/0
    net,x = Odd().eval(),torch.rand(2, 3, 8, 8)
    names,before = list(net.state_dict()),net(x)
    with pytest.raises(ValueError, match='Odd does not run without these channels'): prune(net, .5, x)
    with pytest.raises(ValueError, match='NaN or infinite'): quantize(net, 8, [x, x/0])
    assert list(net.state_dict())==names and torch.equal(net(x), before)

@pytest.mark.parametrize('kw', [dict(batch_first=True), dict(), dict(bias=False), dict(dropout=.5)])
@pytest.mark.parametrize('shape', [(3, 5, 32), (5, 32)])
def test_open_attention_is_the_same_function(kw, shape):
    torch.manual_seed(0)
    closed = nn.MultiheadAttention(32, 4, **kw).eval()
    x = torch.randn(shape)
    n,l = (shape[0], shape[1]) if kw.get('batch_first') else (shape[1], shape[0])
    if len(shape)==2: n,l = None,shape[0]
    attn = copy.deepcopy(closed)
    SelfAttention.open(attn)
    float_mask,bool_mask = torch.randn(l, l),torch.ones(l, l).triu(1).bool()
    per_head = torch.randn(4*(n or 1), l, l)
    padding = torch.zeros(*([n] if n else []), l).bool()
    padding[...,-1] = True
    masked = [{}, dict(attn_mask=float_mask), dict(attn_mask=bool_mask), dict(attn_mask=per_head),
              dict(key_padding_mask=padding), dict(attn_mask=bool_mask, key_padding_mask=padding)]
    weighted = [dict(need_weights=False), dict(need_weights=True), dict(need_weights=True, average_attn_weights=False)]
    for masks in masked:
        for weights in weighted:
            (a,wa),(b,wb) = (m(x, x, x, **masks, **weights) for m in (closed, attn))
            assert a.shape==b.shape and torch.allclose(a, b, atol=1e-6), (masks, weights)
            assert (wa is None and wb is None) or wa.shape==wb.shape and torch.allclose(wa, wb, atol=1e-6)
    attn.close()
    assert type(attn) is nn.MultiheadAttention and list(attn.state_dict())==list(closed.state_dict())
    assert torch.equal(attn(x, x, x)[0], closed(x, x, x)[0])

def test_attention_to_something_else_stays_closed():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn,self.head = nn.MultiheadAttention(32, 4, batch_first=True),nn.Linear(32, 10)
        def forward(self, x):
            x = x.flatten(1, 2)
            return self.head(self.attn(x[:,:2], x, x)[0].mean(1))
    net,x = Cross(),torch.rand(3, 1, 5, 32)
    quantize(net, 8, [x])
    assert type(net.attn) is nn.MultiheadAttention and isinstance(net.head, QuantLinear)

def test_a_quantized_transformer_layer_takes_no_short_cut():
    "PyTorch's fused kernel would read the weights past their quantizers"
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 2)
    net,x = nn.Sequential(nn.Flatten(1, 2), encoder, nn.Linear(32, 10)).eval(),torch.rand(3, 1, 5, 32)
    quantize(net, 2, [x])
    slow = net(x)
    with torch.no_grad(): assert torch.allclose(net(x), slow, atol=1e-6)

def test_global_pruning_keeps_its_floor():
    torch.manual_seed(0)
    net = cnn8()
    net[2].weight.data *= 1e-3                 # a layer that the ranking would take away
    prune(net, .5, torch.rand(2, 1, 28, 28), scope='global', floor=.25)
    left = [m.out_channels for m in net if isinstance(m, nn.Conv2d)]
    assert all(a>=b/4 for a,b in zip(left, (32, 32, 64, 64, 128, 128))) and sum(left) + net[13].out_features == 288

def test_criteria_rank_as_they_say():
    torch.manual_seed(0)
    w = torch.randn(8, 1, 3, 3)
    ranks = {}
    for criterion in ('l1', 'l2', 'bn', 'random'):
        net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8*36, 10))
        net[0].weight.data.copy_(w); net[1].weight.data.copy_(torch.arange(8)); net[4].weight.data.fill_(0)
        prune(net, .5, torch.rand(2, 1, 8, 8), criterion=criterion)
        ranks[criterion] = {i for i in range(8) if any(torch.equal(w[i], o) for o in net[0].weight)}
    assert ranks['bn']=={4, 5, 6, 7} and all(len(o)==4 for o in ranks.values())
    by_norm = lambda p: set((w.flatten(1).abs().pow(p).sum(1)).argsort()[4:].tolist())
    assert by_norm(2)!={4, 5, 6, 7}
    net = lambda: nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(8*36, 10))
    for p in (1, 2):
        m = net(); m[0].weight.data.copy_(w); m[0].bias.data.zero_(); m[2].weight.data.zero_()
        prune(m, .5, torch.rand(2, 1, 8, 8), criterion=f'l{p}')
        assert {i for i in range(8) if any(torch.equal(w[i], o) for o in m[0].weight)}==by_norm(p)

def test_taylor_is_the_formula_and_leaves_no_trace():
    learn = _learner(loss_func=nn.CrossEntropyLoss())
    taylor = Taylor(PGD(.1, steps=1, random_start=False), n_batches=1)
    first = learn.model[0].weight
    first.grad = torch.ones_like(first)
    state = {k: v.clone() for k,v in learn.model.state_dict().items()}
    grads = taylor.gradients(learn)
    (x,y),net = training_batches(learn, 1)[0],learn.model.eval()
    adv = taylor.attack(net, x, y)
    want = torch.autograd.grad(nn.functional.cross_entropy(net(adv), y), list(net.parameters()))
    for p,g in zip(net.parameters(), want): torch.testing.assert_close(grads[p], g)
    assert torch.equal(first.grad, torch.ones_like(first))
    assert all(torch.equal(v, state[k]) for k,v in net.state_dict().items())

def test_prune_sees_through_compile_and_refuses_shared_weights():
    x = torch.rand(2, 1, 8, 8)
    net = cnn8(size=8)
    net.compile(backend='eager')
    net(x)
    prune(net, .5, x)
    assert net(x).shape==(2, 10) and net[0].out_channels==16 and net._compiled_call_impl
    prune(torch.compile(net, backend='eager'), .5, x)
    assert net[0].out_channels==8
    tied = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1),
                         nn.Flatten(), nn.Linear(256, 10))
    tied[2].weight = tied[1].weight
    with pytest.raises(ValueError, match="layers '1' and '2' share a parameter"): prune(tied, .5, x)

def test_a_layer_that_runs_twice_is_cut_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b = nn.Conv2d(1, 8, 3, padding=1),nn.Conv2d(8, 8, 3, padding=1)
            self.c = nn.Linear(8*64, 10)
        def forward(self, x): return self.c(self.b(self.b(self.a(x))).flatten(1))
    net,x = Twice(),torch.rand(2, 1, 8, 8)
    prune(net, .5, x)
    assert net(x).shape==(2, 10) and net.a.out_channels==net.b.in_channels==net.b.out_channels==4

@pytest.mark.parametrize('kw,why', [
    (dict(), 'give one of them'), (dict(share=True), 'share=True'), (dict(keep_macs=1.), 'keep_macs=1.0'),
    (dict(share=.5, scope='layer'), 'use .uniform. or .global.'), (dict(share=.5, floor=1), 'floor=1'),
    (dict(share=.5, round_to=0), 'round_to=0'), (dict(share=dict(a=.5), scope='global'), 'leave nothing to choose'),
    (dict(share=.5, criterion='L1'), 'criterion=.L1. is unknown')])
def test_plans_that_make_no_sense(kw, why):
    with pytest.raises(ValueError, match=why): PruningPlan(**kw)
    with pytest.raises(ValueError, match=why): StructuredPruning(**kw)

@pytest.mark.parametrize('name', ['resnet18', 'mobilenet_v3_small', 'convnext_tiny', 'densenet121'])
def test_pruned_networks_are_quantized(name):
    torch.manual_seed(0)
    net,x = torchvision.models.get_model(name, weights=None, num_classes=10),_pictures()
    prune(net, .5, x)
    quantize(net, (4, 8), [x], ends=8)
    with torch.autocast('cpu', torch.bfloat16): out = net(x)
    assert out.isfinite().all() and out.shape==(2, 10)
    net(x).sum().backward()
    assert all(p.grad is not None for p in net.parameters())

def test_rounded_sums_are_learned():
    "A network that adds in place: the step sizes of its sums have gradients, and rounding is that of the formula"
    torch.manual_seed(0)
    net,x = resnet18_cifar(),torch.rand(8, 3, 32, 32)
    net(x)
    added = quantize(net, 8, [x])
    norm = net.layer1[0].bn2
    assert isinstance(norm, QuantBatchNorm2d) and norm.y_quant.bits==8
    assert [norm.y_quant.log_gain]==list(added[norm.weight])
    net(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert norm.y_quant.log_gain.grad!=0
    out = norm(torch.randn(2, 64, 4, 4))/norm.y_quant.step
    assert torch.allclose(out, out.round(), atol=1e-3)
    plain = resnet18_cifar()
    quantize(plain, 8, [x], sums=False)
    assert not any(isinstance(m, QuantBatchNorm2d) for m in plain.modules())

def test_calibrations_clip_more_or_less():
    torch.manual_seed(0)
    x,q = torch.cat([torch.randn(1, 4096), torch.tensor([[50.]])], 1),Quantizer(4)
    steps = {k: f(x, q).item()*q.hi for k,f in calibrations.items()}
    assert steps['minmax']==pytest.approx(50) and steps['percentile']<5 and steps['mse']<steps['minmax']
    mean = {k: (torch.round(x/(s/q.hi)).clamp(q.lo, q.hi)*s/q.hi-x).square().mean().item() for k,s in steps.items()}
    assert mean['mse']<=min(mean.values())*1.05

def test_bits_for_weights_inputs_and_single_layers():
    x = torch.rand(8, 1, 8, 8)
    net = cnn8(size=8)
    quantize(net, (1, 8), [x], ends=(8, 4), layers={'4': 16, '1[0-9]': (2, 4)})
    bits = {n: (m.w_quant.bits, m.x_quant.bits) for n,m in net.named_modules() if hasattr(m, 'w_quant')}
    assert bits=={'0': (8, 4), '2': (1, 8), '4': (16, 16), '6': (1, 8), '8': (1, 8), '10': (2, 4), '13': (2, 4),
                  '15': (2, 4)}
    for n,(b,_) in bits.items():
        m = net.get_submodule(n)
        assert len(m.w_quant(m.weight).flatten(1)[0].unique())<=2**b

def test_a_fake_quantized_network_compiles_to_the_same_network_and_gradients():
    torch.manual_seed(0)
    x = torch.rand(4, 1, 8, 8)
    net = cnn8(size=8)
    quantize(net, (4, 8), [x])
    def step(f):
        xi = x.clone().requires_grad_()
        out = f(xi)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), [xi, *net.parameters()])]
    for a,b in zip(step(net), step(torch.compile(net, backend='aot_eager'))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
