"What adversarial training promises and would bore a reader of the notebooks"
import math, os
import pytest, torch, torch.distributed as dist
from torch import nn, Tensor
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from adverfine.networks.precision import in_bf16
from adverfine.networks.zoo import cnn8, resnet18_cifar
from adverfine.networks.modes import bare, frozen
from adverfine.networks.fused import crafting_network
from adverfine.data.images import BatchDL
from adverfine.data.sources import digits_dls
from adverfine.attacks.attack import input_grad
from adverfine.attacks.gradient import FGSM, FGSMRS, PGD
from adverfine.attacks.adaptive import EOT, Transfer
from adverfine.attacks.torchattacks import TorchAttack
from adverfine.evaluation.metric import RobustAccuracy
from adverfine.training.acceleration import BF16, Compile
from adverfine.training.objectives import Madry, MART, RSLAD, TRADES
from adverfine.training.adversarial import AdversarialTraining
from adverfine.training.free import FreeAdversarialTraining
from adverfine.training.averaging import WeightAverage
from adverfine.training.perturbation import AWP
from adverfine.training.warmup import EpsilonWarmup
import adverfine.compression.pruning, adverfine.compression.quantization  # noqa: F401 verbs of a Learner
import fastai.callback.progress, fastai.callback.schedule, fastai.distributed  # noqa: F401 verbs of a Learner
from processes import gathered, two_processes

def _fit(learn, epochs=1, lr=1e-3, cbs=None):
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, lr, cbs=cbs)
    return learn

def _weights(learn): return torch.cat([p.detach().flatten() for p in bare(learn.model).parameters()])

def _bn_net():
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))

# --- several processes

# in l2 a step follows the gradient itself: the sign of one that is nearly zero is decided by rounding
deterministic = PGD(.5, norm='l2', steps=3, random_start=False)

class InFloat64(nn.Module):
    "In float32, rounding would grow with every step, and to what depends on the processor"
    def __init__(self, network):
        super().__init__()
        self.network = network.double()
    def forward(self, x): return self.network(x.double()).float()

def _train(bs, objective, **kwargs):
    set_seed(0)
    dls = digits_dls(bs=bs, n_train=142, normalize=(.5,.5))
    metrics = [accuracy, RobustAccuracy(deterministic)]
    learn = Learner(dls, InFloat64(cnn8(size=8)), opt_func=SGD, metrics=metrics, **kwargs)
    assert len(learn.dls.train.dataset)==128
    return learn, [AdversarialTraining(deterministic, objective() if objective else None)]

def _rank(rank, path):
    os.environ['ACCELERATE_USE_CPU'] = 'true'
    for name,objective in dict(madry=None, mart=MART).items():
        learn,cbs = _train(64, objective)
        with learn.distrib_ctx(sync_bn=False, cpu=True), learn.no_bar(), learn.no_logging():
            assert dist.get_backend()=='gloo'
            learn.fit(4, .1, cbs=cbs)
            record = learn.final_record
        out = gathered(_weights(learn))
        assert torch.equal(*out)
        if not rank: torch.save(dict(weights=out[0], record=list(record)), f'{path}/{name}.pt')

@pytest.mark.skipif(not dist.is_available(), reason='torch without distributed')
def test_two_processes_equal_one_with_the_doubled_batch(tmp_path):
    "fastai's `distrib_ctx` on two CPU processes: the same weights and the same table"
    two_processes(_rank, tmp_path)
    for name,objective in dict(madry=None, mart=MART).items():
        learn,cbs = _train(128, objective)
        begin = _weights(learn).clone()
        _fit(learn, 4, .1, cbs)
        theirs = torch.load(tmp_path/f'{name}.pt', weights_only=True)
        moved = (_weights(learn)-begin).abs().max()
        assert moved>.01 and (_weights(learn)-theirs['weights']).abs().max() < 1e-6*moved
        assert torch.allclose(torch.tensor(learn.final_record[1:]), torch.tensor(theirs['record'][1:]), atol=.08)

# --- what is left behind

class Trouble(Callback):
    "Fail in the forward pass of the second batch"
    order = 60
    def before_batch(self):
        if self.training and self.iter==1: raise RuntimeError('trouble')

def _learner(net=None, **kwargs):
    set_seed(0)
    return Learner(digits_dls(n_train=300), (net or (lambda: cnn8(size=8)))(), metrics=accuracy, **kwargs)

@pytest.mark.parametrize('make', [
    AWP,
    lambda: EpsilonWarmup(1),
    BF16,
    lambda: Compile(backend='aot_eager'),
    WeightAverage])
def test_a_failed_fit_leaves_nothing(make):
    learn,adversarial = _learner(),AdversarialTraining(PGD(.1, steps=2))
    awp_seen = []
    class AfterFirst(Callback):
        order = 70
        def after_batch(self):
            if self.training: awp_seen.append(_weights(learn).clone())
    with pytest.raises(RuntimeError, match='trouble'):
        _fit(learn, cbs=[adversarial, make(), AfterFirst(), Trouble()])
    assert torch.equal(_weights(learn), awp_seen[0])            # of the batch in which trouble came, nothing is left
    assert adversarial.attack==PGD(.1, steps=2)
    x = learn.dls.valid.one_batch()[0].as_subclass(Tensor)
    fresh = cnn8(size=8)
    fresh.load_state_dict(learn.model.state_dict())
    assert not in_bf16(learn.model) and torch.equal(learn.model(x), fresh(x))
    assert 'forward' not in vars(learn.model) and learn.model._compiled_call_impl is None     # gone at that call
    assert all(p.requires_grad for p in learn.model.parameters())

# --- AWP

def test_awp_takes_the_gradient_where_it_says():
    "One step of SGD by hand, at weights moved by gamma times their norm along the gradient"
    attack,gamma,lr = PGD(.1, steps=2, random_start=False),.02,.1
    dls = digits_dls(bs=64, n_train=71, valid_pct=.1)
    learn = Learner(dls, cnn8(size=8), opt_func=SGD, loss_func=nn.CrossEntropyLoss())
    start = [p.detach().clone() for p in learn.model.parameters()]
    class Keep(Callback):
        order = 24
        def before_batch(self):
            if self.training: self.learn.kept = self.xb[0].clone(),self.yb[0].as_subclass(Tensor)
    _fit(learn, 1, lr, [AdversarialTraining(attack), AWP(gamma), Keep()])
    by_hand = cnn8(size=8)
    weights = list(by_hand.parameters())
    with torch.no_grad():
        for p,s in zip(weights, start): p.copy_(s)
    grad = lambda: torch.autograd.grad(nn.functional.cross_entropy(by_hand(learn.kept[0]), learn.kept[1]), weights)
    uphill = grad()
    with torch.no_grad():
        for p,g in zip(weights, uphill):
            if p.dim()>1: p += gamma*p.norm()*g/g.norm()
    moved = grad()
    for p,s,g in zip(learn.model.parameters(), start, moved):
        torch.testing.assert_close(p.detach(), s-lr*g, rtol=1e-4, atol=1e-6)

def test_awp_hides_its_extra_pass_from_batchnorm():
    learns = [_learner(_bn_net, opt_func=SGD) for _ in range(2)]
    for learn,cbs in zip(learns, ([], [AWP()])): _fit(learn, 1, 0., [AdversarialTraining(deterministic), *cbs])
    assert learns[0].model[1].num_batches_tracked==learns[1].model[1].num_batches_tracked

def test_awp_needs_adversarial_training():
    with pytest.raises(ValueError, match='add AdversarialTraining'): _fit(_learner(), cbs=AWP())

# --- averages

class Trace(Callback):
    order = 56
    def before_fit(self): self.all = []
    def after_step(self): self.all.append(_weights(self.learn).clone())

def test_average_is_the_mean_of_all_steps():
    learn,trace = _learner(),Trace()
    _fit(learn, 3, cbs=[WeightAverage(None), trace])
    torch.testing.assert_close(_weights(learn), torch.stack(trace.all).mean(0), rtol=1e-4, atol=1e-6)

@pytest.mark.parametrize('decay', [.99, .6, 0.])
def test_average_begins_gently(decay):
    "The k-th step keeps `1-9/(k+9)` of the mean, until that reaches `decay`: the first weights do not linger"
    learn,trace = _learner(),Trace()
    _fit(learn, 3, cbs=[WeightAverage(decay), trace])
    mean = trace.all[0].double()
    for k,w in enumerate(trace.all[1:], 2):
        keep = min(decay, k/(k+9))
        mean = keep*mean+(1-keep)*w
    assert len(trace.all)>10 and not torch.allclose(mean.float(), trace.all[-1], rtol=1e-4, atol=1e-6) or decay==0
    torch.testing.assert_close(_weights(learn), mean.float(), rtol=1e-4, atol=1e-6)

def test_average_starts_late_and_training_does_not_notice():
    "The optimizer goes on with its own weights, though the mean of them was validated"
    traces = [Trace(), Trace()]
    for trace,cbs in zip(traces, ([], [WeightAverage(.9, start=.5)])): _fit(_learner(), 4, cbs=[trace, *cbs])
    assert all(torch.equal(a, b) for a,b in zip(traces[0].all, traces[1].all))

def test_batchnorm_is_estimated_on_adversarial_batches():
    learn = _learner(_bn_net)
    class Keep(Callback):
        order = 50
        def before_fit(self): self.seen = []
        def after_pred(self):
            if self.training: self.seen.append(self.xb[0].detach())
    keep = Keep()
    _fit(learn, 2, cbs=[AdversarialTraining(PGD(.1, steps=2)), WeightAverage(batches=3), keep])
    conv,bn = learn.model[0],learn.model[1]
    with torch.no_grad(): outs = [conv(x) for x in keep.seen[-3:]]
    mean = torch.stack([o.mean((0,2,3)) for o in outs]).mean(0)
    torch.testing.assert_close(bn.running_mean, mean, rtol=1e-3, atol=1e-4)
    assert bn.momentum==.1

def test_frozen_batchnorm_is_not_estimated():
    learn = _learner(_bn_net)
    class Frozen(Callback):
        def before_batch(self): learn.model[1].eval()
    _fit(learn, 1, cbs=[AdversarialTraining(PGD(.1, steps=1)), WeightAverage(), Frozen()])
    assert not learn.model[1].running_mean.any() and (learn.model[1].running_var==1).all()

def test_average_begins_afresh_when_shapes_change():
    from adverfine.compression.pruning import StructuredPruning
    learn = _learner()
    _fit(learn, 3, cbs=[WeightAverage(), StructuredPruning(.5), AdversarialTraining(PGD(.1, steps=1))])
    assert learn.model[0].out_channels==16

# --- warm-up, free

def test_warmup_scales_steps_too():
    learn,seen = _learner(),[]
    class Watch(Callback):
        order = 21
        def before_batch(self):
            if self.training: seen.append(self.learn.adversarial_training.attack_now)
    _fit(learn, 4, cbs=[AdversarialTraining(PGD(.1, steps=2, step_size=.04)), EpsilonWarmup(.5), Watch()])
    assert seen[0].eps==0 and seen[-1]==PGD(.1, steps=2, step_size=.04)
    assert all(abs(a.step_size-.4*a.eps) < 1e-9 for a in seen if a.eps)
    assert [a.eps for a in seen]==sorted(a.eps for a in seen)

def _transferred(): return Transfer(PGD(.1, steps=1, step_size=.04), cnn8(size=8).eval())
def _averaged(): return EOT(PGD(.1, steps=1, step_size=.04), samples=2)
def _theirs():
    import torchattacks
    return TorchAttack(torchattacks.PGD, .1, steps=1, alpha=.04)

@pytest.mark.parametrize('make', [_transferred, _averaged, _theirs])
def test_warmup_of_attacks_with_arguments_of_their_own(make):
    learn,seen,attack = _learner(),[],make()
    class Watch(Callback):
        order = 21
        def before_batch(self):
            if self.training: seen.append(self.learn.adversarial_training.attack_now)
    _fit(learn, 4, cbs=[AdversarialTraining(attack), EpsilonWarmup(.5), Watch()])
    budgets = [a.eps for a in seen]
    n = len(budgets)
    assert budgets[0]==0 and budgets[-1]==.1 and seen[-1]==attack
    assert all(abs(b-.1*min(1, 2*k/n))<1e-6 for k,b in enumerate(budgets))
    surrogate = getattr(attack, 'surrogate', None)
    assert all(type(a) is type(attack) and getattr(a, 'surrogate', None) is surrogate for a in seen)
    step = lambda a: a.attack.step_size if isinstance(a, (EOT, Transfer)) else dict(a.kwargs)['alpha']
    assert all(abs(step(a)-.4*a.eps)<1e-9 for a in seen if a.eps)
    x,y = torch.rand(4, 1, 8, 8),torch.arange(4)
    for share in (0, .5, 1):
        x_adv = attack.scaled(share)(learn.model.eval(), x, y)
        assert (x_adv-x).abs().max()<=.1*share+1e-6
    with pytest.raises(ValueError, match='share=2'): attack.scaled(2)

def test_replace_makes_another_attack():
    from dataclasses import replace
    a,b = _transferred(),_theirs()
    other = cnn8(size=8)
    assert replace(a, surrogate=other).surrogate is other and replace(a, attack=FGSM(.2)).eps==.2
    assert replace(b, eps=.2).eps==.2 and replace(b, eps=.2).kwargs==b.kwargs and replace(b)==b

@pytest.mark.parametrize('objective', [lambda: TRADES(6), lambda: RSLAD(cnn8(size=8).eval())])
def test_objectives_on_probabilities_take_transferred_pgd(objective):
    learn = _learner()
    before = _weights(learn)
    _fit(learn, cbs=AdversarialTraining(_transferred(), objective()))
    assert not torch.equal(before, _weights(learn))
    transferred = Transfer(_theirs(), learn.model)
    with pytest.raises(ValueError, match='does not take'):
        _fit(learn, cbs=AdversarialTraining(transferred, objective()))

def test_free_replays_and_keeps_the_budget():
    learn,far = _learner(),[]
    class Watch(Callback):
        order = 21
        def before_batch(self):
            if self.training: far.append((self.xb[0]-self.learn.free_adversarial_training.images).abs().max().item())
    free = FreeAdversarialTraining(.1, replays=3)
    _fit(learn, 2, cbs=[free, Watch()])
    assert len(far)==3*2*len(learn.dls.train) and far[0]==0 and .09<max(far)<=.1+1e-6
    assert isinstance(learn.dls.train, BatchDL)

# --- numbers that are none

def test_float16_gradients_are_scaled():
    "A network whose input gradient overflows in float16, one whose gradient vanishes, and one beyond help"
    x,y = torch.rand(4, 1, 4, 4),torch.tensor([0,1,0,1])
    class Half(nn.Module):
        def __init__(self, up, down): super().__init__(); self.up,self.down = up,down
        def forward(self, x):
            x = x.half().flatten(1)
            return ((torch.stack([x.mean(1), -x.mean(1)], 1)*self.down)*self.up)
    def exact(up, down):
        "The gradient in float32"
        z = x.clone().requires_grad_()
        mean = z.flatten(1).mean(1)
        logits = torch.stack([mean, -mean], 1)*up*down
        return torch.autograd.grad(nn.functional.cross_entropy(logits, y, reduction='sum'), z)[0]
    for up,down in (3e4, 3e-5), (1., 1.), (1., 2e-3):
        got = input_grad(Half(up, down), x, y)
        assert torch.isfinite(got).all() and (got.sign()==exact(up, down).sign()).all()
    x_adv = PGD(.1, steps=3)(Half(6e4, 1.), x, y)
    assert torch.isfinite(x_adv).all()

def test_a_loss_that_is_no_number_stops_the_fit():
    learn = _learner(loss_func=lambda p,y: nn.functional.cross_entropy(p, y)*float('inf'))
    with pytest.raises(FloatingPointError, match='epoch 0, batch 0: lower the learning rate'):
        _fit(learn, cbs=AdversarialTraining(PGD(.1, steps=1)))

def test_lr_find_survives_divergence():
    learn = _learner(cbs=AdversarialTraining(PGD(.1, steps=1)))
    with learn.no_bar(), learn.no_logging(): learn.lr_find(end_lr=1e12, num_it=30, show_plot=False)

# --- objectives and their neighbours

@pytest.mark.parametrize('objective', [Madry(), TRADES(2), MART(2)])
def test_objectives_compose(objective):
    "With BF16, gradient accumulation, AWP, averaging and warm-up; likewise a compressed network with its parent"
    from fastai.callback.training import GradientAccumulation, GradientClip
    learn = _learner(_bn_net)
    def cbs(objective):
        return [AdversarialTraining(PGD(.1, steps=2), objective), BF16(), GradientAccumulation(128), GradientClip(),
                AWP(), EpsilonWarmup(.5), WeightAverage()]
    _fit(learn, 2, cbs=cbs(objective))
    assert all(map(math.isfinite, learn.final_record))
    teacher = learn.frozen_copy()
    assert not any(p.requires_grad for p in teacher.parameters())
    learn.prune(.5).quantize(4)
    _fit(learn, 2, cbs=cbs(RSLAD(teacher)))

def test_metrics_see_the_attacked_half_only():
    learn,sizes = _learner(),set()
    class Watch(Callback):
        order = 90
        def after_loss(self): sizes.add((self.training, len(self.pred), len(self.yb[0])))
    _fit(learn, cbs=[AdversarialTraining(PGD(.1, steps=1), TRADES()), Watch()])
    assert {training for training,_,_ in sizes}=={True, False} and all(a==b for _,a,b in sizes)

def test_bf16_copy_does_not_borrow_the_original():
    "A frozen copy made while BF16 is at work computes with its own weights, and in float32 when BF16 has gone"
    learn = _learner()
    class Copy(Callback):
        order = 30
        def before_batch(self):
            assert in_bf16(self.model)
            self.learn.copied = self.learn.frozen_copy()
    _fit(learn, cbs=[BF16(), Copy()])
    copied,x = learn.copied,learn.dls.valid.one_batch()[0].as_subclass(Tensor)
    before = copied(x)
    for p in learn.model.parameters(): p.data.zero_()
    assert torch.equal(copied(x), before) and not in_bf16(copied) and 'forward' not in vars(copied)

@pytest.mark.parametrize('bad,why', [
    (lambda: WeightAverage(1.), 'decay=1.0 must lie'),
    (lambda: WeightAverage(start=2), 'start=2 must lie'),
    (lambda: AWP(0), 'gamma=0 must be'),
    (lambda: EpsilonWarmup(0), 'pct=0 must lie'),
    (lambda: MART(-1), 'lam=-1 must be'),
    (lambda: FGSMRS(.1, step_size=0), 'step_size=0 must be')])
def test_bad_arguments(bad, why):
    with pytest.raises(ValueError, match=why): bad()

# --- the network to craft on

class Odd(nn.Module):
    "Shared and functional ReLU, dropout, groups, dilation, a convolution that two others use, BatchNorm without affine"
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(1, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4, bias=False)
        self.c = nn.Conv2d(8, 8, (3,1), stride=(2,1))
        self.norm = nn.BatchNorm2d(8, affine=False)
        self.plain = nn.BatchNorm2d(8, track_running_stats=False)
        self.relu = nn.ReLU()
        self.head = nn.Linear(8, 10)
    def forward(self, x):
        x = nn.functional.relu(self.a(x))
        x = self.relu(self.norm(self.b(x)) + x)
        y = self.c(x)
        y = self.plain(nn.functional.dropout(y, .5, self.training)) + y
        return self.head(self.relu(y).mean((2,3)))

def _gradient(network, x):
    z = x.clone().requires_grad_()
    with frozen(network): return torch.autograd.grad(network(z).float().logsumexp(1).sum(), z)[0]

def test_crafting_network_of_an_odd_one():
    torch.manual_seed(0)
    net,x = Odd(),torch.rand(6, 1, 8, 8)
    for _ in range(3): net(x)
    flags = [m.training for m in net.modules()]
    fast = crafting_network(net, x)
    assert len(fast.fused)==4 and [m.training for m in net.modules()]==flags
    torch.testing.assert_close(_gradient(fast, x), _gradient(net, x), rtol=1e-4, atol=1e-6)
    with torch.no_grad(): net.a.weight.mul_(2)
    # weights are shared
    torch.testing.assert_close(_gradient(fast.prepare(), x), _gradient(net, x), rtol=1e-4, atol=1e-6)
    assert not any(p.grad is not None for p in net.parameters())

def test_crafting_network_in_bfloat16_is_no_worse_than_bfloat16_is():
    torch.manual_seed(0)
    net,x = resnet18_cifar(),torch.rand(6, 3, 16, 16)
    for _ in range(3): net(x)
    exact = _gradient(net, x).flatten()
    with torch.autocast('cpu', torch.bfloat16): rounded = _gradient(net, x).flatten()
    similar = lambda g: nn.functional.cosine_similarity(g, exact, 0)
    fast = crafting_network(net, x, bf16=True)
    if fast is None: pytest.skip('this processor has no convolutions in bfloat16')
    assert similar(_gradient(fast.prepare(bf16=True), x).flatten()) > similar(rounded)-.02

def test_crafting_network_stands_back():
    "Hooks must be heard, parametrizations stay as they are, other precisions too"
    x = torch.rand(4, 1, 8, 8)
    hooked = cnn8(size=8)
    hooked[1].register_forward_hook(lambda m, i, o: o*2)
    class Choosy(nn.Module):
        def __init__(self): super().__init__(); self.conv = nn.Conv2d(1, 8, 3)
        def forward(self, x): return (self.conv(x) if x.mean()>0 else x).mean((2,3))
    with pytest.warns(UserWarning, match='Choosy is crafted on as it is, since torch.fx cannot trace it'):
        assert crafting_network(Choosy(), x) is None
    parametrized = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 10, 3)), nn.Flatten())
    without_convolutions = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    for net in hooked, parametrized, without_convolutions: assert crafting_network(net, x) is None
    assert crafting_network(cnn8(size=8).double(), x.double()) is None

def test_training_does_not_notice_the_crafting_network(monkeypatch):
    from adverfine.training import adversarial
    learns = []
    for off in (False, True):
        if off: monkeypatch.setattr(adversarial, 'crafting_network', lambda *args: None)
        learns.append(_learner(_bn_net))
        _fit(learns[-1], 2, cbs=AdversarialTraining(PGD(.1, steps=3, random_start=False)))
    torch.testing.assert_close(_weights(learns[0]), _weights(learns[1]), rtol=1e-2, atol=1e-3)

def test_pruning_between_epochs_is_seen():
    from adverfine.compression.pruning import StructuredPruning
    learn = _learner()
    _fit(learn, 3, cbs=[StructuredPruning(.5), AdversarialTraining(PGD(.1, steps=2))])
    assert learn.model[0].out_channels==16 and not hasattr(learn.model, 'network')

# --- forwards of their own

def test_bf16_twice_and_over_a_forward_of_its_own():
    "On the Learner and on a fit; over a `forward` that was given to the instance, which is used and put back"
    class Watch(Callback):
        order = 30
        def after_pred(self): self.learn.seen = in_bf16(self.model),self.pred.dtype,bool(self.pred.any())
    learn = _learner(cbs=[BF16(), Watch()])
    for cbs in [], [BF16()]:
        _fit(learn, cbs=cbs)
        assert learn.seen==(True, torch.float32, True) and 'forward' not in vars(learn.model)

    net = cnn8(size=8)
    net.forward = zeros = lambda x: nn.Sequential.forward(net, x)*0
    learn = Learner(learn.dls, net, cbs=[BF16(), Watch()])
    _fit(learn)
    assert learn.seen==(True, torch.float32, False) and net.forward is zeros

def test_crafting_network_knows_a_forward_of_its_own():
    net,x = cnn8(size=8),torch.rand(4, 1, 8, 8)
    assert crafting_network(net, x) is not None
    net.forward = lambda x: nn.Sequential.forward(net, x)*0
    assert crafting_network(net, x) is None
