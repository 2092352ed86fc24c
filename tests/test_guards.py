"Each guard on the smallest network that it must, and must not, complain of"
from dataclasses import dataclass
import pytest, torch, torchattacks
from torch import nn
from adverfine.attacks.attack import Attack
from adverfine.attacks.gradient import FGSM, PGD
from adverfine.attacks.adaptive import EOT, Transfer
from adverfine.attacks.apgd import APGD
from adverfine.attacks.square import Square
from adverfine.attacks.torchattacks import TorchAttack
from adverfine.attacks.triage import Triage
from adverfine.attacks.scoring import Scorer
from adverfine.attacks.surrogates import Rescaled
from adverfine.evaluation.cases import Case, Guard, guards
from adverfine.evaluation.guards import _by_margin, inspect

class Then(nn.Module):
    def __init__(self, f): super().__init__(); self.f = f
    def forward(self, x): return self.f(x)

def _linear(scale=1.):
    "Class 0 where the first two pixels outweigh the last two: the margin is 4 scale (x0+x1-x2-x3)"
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False))
    w = torch.tensor([1., 1, -1, -1])
    net[1].weight.data = torch.stack([2*w, -2*w, -8*torch.ones(4)])*scale
    return net.eval()

def _x(n, gap=.02): return (torch.full((n, 4), .5)+torch.tensor([gap, gap, -gap, -gap])).view(n, 1, 2, 2)

def _case(model, n=8, attacks=(PGD(.1),), gap=.02, odd=0, fallen=0, fast=None, **kw):
    "`n` images of class 0; the first pixel of the first `odd` ones is .7; the first `fallen` have fallen before"
    x = _x(n, gap)
    x[:odd,:,:1,:1] = .7
    judge = Scorer(model, x, torch.zeros(n, dtype=torch.long), standing=torch.ones(n, dtype=torch.bool), fast=fast)
    judge.stands[:fallen] = False
    return Case(judge, attacks, **kw)

def _measure(name, case): return guards[name].measure(case)
def _value(name, case): return _measure(name, case)[0]

class Counting(nn.Module):
    def __init__(self, net): super().__init__(); self.net,self.calls,self.sizes = net,0,[]
    def forward(self, x):
        self.calls += 1; self.sizes.append(len(x))
        return self.net(x)

def _blind(net=None):
    net = net or _linear()
    return Then(lambda x: net(x).detach())

@dataclass(frozen=True)
class Blacken(Attack):
    "Fools where the first pixel is above .6; notes whom it saw, and the seed of its generator"
    steps:int = 1
    white_box = True
    def craft(self, model, x, y, generator):
        seen.append((model, len(x), generator.initial_seed(), self.steps))
        return torch.where((x[:,:,:1,:1]>.6), 1-x, x)

seen = []

def test_thresholds():
    "What a reader relies on: which number is suspicious, what it is a sign of, and which guards try attacks"
    assert {k: (g.limit, g.sign_of, g.tries, g.thorough) for k,g in guards.items()}==dict(
        determinism=(1e-4, 'masking', False, False), probabilities=(0, 'masking', False, False),
        gradients=(0, 'masking', False, False), zero_gradient=(0, 'masking', False, False),
        unbounded=(.05, 'masking', False, False), agreement=(.01, 'masking', False, False),
        plateau=(.05, 'weakness', False, True), scaled_margin=(.01, 'weakness', True, False),
        convergence=(.005, 'weakness', True, True), surrogate=(.01, 'masking', True, False),
        transfer=(.01, 'masking', True, False), black_box=(.01, 'masking', True, False))
    assert all(g.remedy and g.source for g in guards.values())

def test_case():
    case = _case(_linear(), 300)
    assert len(case.some()[0])==128 and len(case.some()[1])==128 and len(case.some(5)[0])==5
    assert len(_case(_linear(), 300, thorough=True).some()[0])==300
    few = _case(_linear(), 300)
    few.judge.clean[:290] = False
    assert len(few.x)==len(few.y)==10                        # what is wrong clean is nothing to a guard
    fake,fast = _linear(),_linear()
    case = _case(_linear(), fast=fast)
    assert case.climbed is case.model is case.judge.model and case.quick is fast
    both = _case(_blind(), fake_quantized=fake, fast=fast)
    assert both.climbed is fake is both.quick and _case(fake).quick is fake
    assert not case.blind and _case(_blind()).blind and not both.blind
    with torch.no_grad(): assert not case.blind
    assert case.white==[PGD(.1)] and _case(_linear(), attacks=(Square(.1),)).white==[]
    assert _case(_linear(), attacks=(Transfer(PGD(.1), fake),)).white==[PGD(.1)]
    made = _case(_linear(), attacks=(PGD(.1, norm='l2', clamp=False),)).same(APGD, steps=3)
    assert made==APGD(.1, norm='l2', clamp=False, steps=3)

def test_a_network_that_takes_no_gradient_is_blind_whatever_its_weights_want():
    for net in (nn.Sequential(Then(lambda x: x.detach()), _linear()), lambda x, net=_linear(): net(x.detach())):
        assert _case(net).blind and not {'zero_gradient', 'unbounded'} & {o.guard for o in inspect(_case(net))}

def test_a_random_network_is_attacked_on_the_average():
    noisy = Then(lambda x, net=_linear(): net(x+.01*torch.randn_like(x)))
    case = _case(noisy, attacks=(FGSM(.1),), thorough=True)
    assert case.random and not _case(_linear()).random
    assert case.same(PGD, steps=3)==EOT(PGD(.1, steps=3), 8) and case.same(Square, queries=3)==Square(.1, queries=3)
    assert case.steadied(FGSM(.1))==EOT(FGSM(.1), 8)
    assert 'PGD-10 EOT-8 with 10 steps instead of 1' in _measure('convergence', case)[1]

@pytest.mark.parametrize('thorough', [False, True])
def test_accuracy_that_an_attack_costs(thorough):
    net,n = _linear(),600
    case = _case(net, n, fallen=20, thorough=thorough)
    case.judge.x[310:,:,:1,:1] = .7           # half of those that stand will fall, and half of a sample of them
    seen.clear()
    tried = 580 if thorough else 128
    assert case.take('x', Blacken(1.), .01)==pytest.approx((.5*580/600, 580/600/tried))
    assert sum(o[1] for o in seen)==tried and max(o[1] for o in seen)<=256
    assert all(o[0].network is net and o[0].through is None for o in seen)
    assert case.judge.robust==(580-tried/2)/600                                   # and is paid at once
    outcomes = case.judge.outcomes
    fall = [20+k*580//tried for k in range(tried//2, tried)]
    assert outcomes.count('guard x')==tried/2 and all(outcomes[k]=='guard x' for k in fall)
    assert not any(case.judge.stands[fall]) and all(case.judge.stands[20:310])
    case.judge.stands[:] = False
    assert case.take('x', Blacken(1.), .01)==(0, 0)
    case.judge.stands[:] = True
    other = _linear()
    seen.clear()
    case.take('x', Transfer(Blacken(1.), other), .01)
    assert all(o[0].network is other for o in seen)
    case.judge.stands[:] = True
    seen.clear()
    case.take('x', Blacken(1.), .01, other)
    assert all(o[0].through is other for o in seen)

@pytest.mark.parametrize('limit,tried', [(.05, 128), (.01, 128), (1/200, 200), (.002, 500), (.0001, 600)])
def test_the_sample_grows_until_an_image_is_worth_the_limit(limit, tried):
    seen.clear()
    _case(_linear(), 600).take('x', Blacken(1.), limit)
    assert sum(o[1] for o in seen)==tried

@pytest.mark.parametrize('n,odd,limit,ok', [(8, 1, 1/8, True), (8, 2, 1/8, False), (100, 1, .01, True),
    (100, 2, .01, False), (600, 1, .01, True), (600, 6, .01, False)])
def test_a_limit_is_never_finer_than_one_image(n, odd, limit, ok):
    "One image more is never suspicious; with 128 of 600 tried, two of the six are among them, worth 1/128 each"
    def measure(case):
        gain,one = case.take('x', Blacken(1.), .01)
        return gain,'x',one
    found = Guard(measure, .01, 'here', 'masking', 'more').find('x', _case(_linear(), n, odd=odd))
    assert (found.limit, found.ok)==(pytest.approx(limit), ok) and (found.guard, found.source)==('x', 'here')

def test_images_are_crafted_on_the_fast_network_and_judged_by_the_exact_one():
    asked = []
    def noting(name, net): return Then(lambda x: (asked.append((name, x.requires_grad)), net(x))[1])
    fast = noting('fast', _linear())
    case = _case(noting('exact', _linear()), fast=fast)
    assert case.take('x', PGD(.1, steps=2), .01, case.quick)[0]==1
    assert asked==[('fast', True)]*2+[('exact', False)]
    # what a fast network claims and the exact one does not confirm does not count
    wrong = Then(lambda x, net=_linear(): -net(x))
    for attack in (APGD(.1, steps=5), Square(.1, queries=5), PGD(.1, steps=3)):
        case = _case(_linear(), fast=wrong, gap=.2)
        assert case.take('x', attack, .01)[0]==0 and case.judge.robust==1

def test_look():
    net = _linear()
    quiet = {o.guard for o in inspect(_case(net))}
    assert {'determinism', 'scaled_margin', 'black_box'}<=quiet
    assert not {'convergence', 'plateau', 'transfer', 'agreement', 'surrogate'}&quiet
    assert {'convergence', 'plateau'}<={o.guard for o in inspect(_case(net, thorough=True))}
    tries = {o.guard for o in inspect(_case(net), tries=True)}
    looks = {o.guard for o in inspect(_case(net), tries=False)}
    assert tries=={'scaled_margin', 'black_box'} and looks | tries==quiet and not looks & tries
    case = _case(net)
    case.judge.clean[:] = False
    assert inspect(case)==()
    net.train()
    [found] = [o for o in inspect(_case(net, gap=.2)) if o.guard=='scaled_margin']
    assert net.training and found.ok and found.value==0 and str(found).startswith('ok')
    case = _case(net)
    [found] = [o for o in inspect(case) if o.guard=='scaled_margin']
    assert not found.ok and found.value==1 and found.source=='arXiv 2003.01690' and found.limit==1/8
    assert str(found).startswith('FLAGGED') and found.sign_of=='weakness' and 'AutoAttack' in found.remedy
    assert case.judge.robust==0 and set(case.judge.outcomes)=={'guard scaled_margin'}

def test_determinism():
    net = Counting(_linear())
    assert _value('determinism', _case(net))==0 and net.calls==5
    def late(by, big=1.):
        "Logits of length `big`, which move by `by` in the fifth pass"
        calls = []
        def f(x):
            calls.append(1)
            z = torch.tensor([1., 0, 0]).repeat(len(x), 1)*big
            if len(calls)==5: z[-1,1] += by
            return z
        return Then(f)
    assert _value('determinism', _case(late(.01)))==pytest.approx(.01, rel=.01)
    # it is the share of the logits that counts
    assert _value('determinism', _case(late(1., 1000.)))==pytest.approx(.001, rel=.01)
    value,says = _measure('determinism', _case(late(5.)))
    assert value==float('inf') and says.startswith('between 7 and 8 of 8')
    assert _value('determinism', _case(Then(lambda x: torch.zeros(len(x), 3))))==0

@pytest.mark.parametrize('z,flagged', [([.7, .2, .1], 1), ([1., 0, 0], 1), ([.7, .2, .2], 0), ([1.5, -.5, 0], 0),
    ([.8, .4, -.2], 0), ([2., 1, 0], 0), ([.7, .2, .10005], 0)])
def test_probabilities(z, flagged):
    value,says = _measure('probabilities', _case(Then(lambda x: torch.tensor(z).repeat(len(x), 1))))
    assert value==flagged and ('returns probabilities' in says)==bool(flagged)
    mixed = Then(lambda x: torch.stack([torch.tensor(z), torch.tensor([3., 2, 1])]).repeat(len(x)//2, 1))
    assert _value('probabilities', _case(mixed))==0

def test_gradients():
    assert _value('gradients', _case(_blind()))==1 and _value('gradients', _case(_linear()))==0
    assert 'no gradients' in _measure('gradients', _case(_blind()))[1]
    assert 'can be' in _measure('gradients', _case(_linear()))[1]

def test_zero_gradient():
    net = _linear()
    half = Then(lambda x: torch.where((x[:,0,0,0]>.6)[:,None], net(x).detach(), net(x)))
    case = _case(half, 600, odd=150, thorough=True)
    assert _value('zero_gradient', case)==.25
    # where the network answers the same in all of the ball, nothing is hidden
    silent = Then(lambda x: torch.where((x[:,0,0,0]>.6)[:,None], torch.tensor([3., 2, 1]), net(x)))
    assert _value('zero_gradient', _case(silent, 600, odd=150, thorough=True))==0
    # nor where the image alone has no gradient, and its neighbours have
    alone = Then(lambda x: torch.where((x[:,0,0,0]==x.new_tensor(.7))[:,None], net(x).detach(), net(x)))
    assert _value('zero_gradient', _case(alone, 600, odd=150, thorough=True))==0
    # some pixels without a gradient are no reason
    one = Then(lambda x: net(torch.cat([x[:,:,:1], x[:,:,1:].detach()], 2)))
    assert _value('zero_gradient', _case(one))==0
    assert _measure('zero_gradient', _case(_blind())) is None and net[1].weight.requires_grad

def test_unbounded():
    net = Counting(_linear())
    # is it blind, twenty steps, a verdict
    assert _value('unbounded', _case(net, 100, gap=.2))==0 and net.sizes==[1]+[64]*21
    stubborn = Then(lambda x: torch.tensor([1., 0, 0])+0*x.flatten(1)[:,:1])
    assert _value('unbounded', _case(stubborn))==1 and _measure('unbounded', _case(_blind())) is None

def test_the_margin_is_taken_on_rescaled_logits():
    "In l2 a step along a gradient of 1e-20 is no step, unless the logits are brought to unit size before"
    attacks = PGD(.1, norm='l2', steps=20),
    weak = _case(_linear(1e-20), attacks=attacks, gap=.049)
    assert weak.take('x', attacks[0], .01)[0]==0==weak.take('x', APGD(.1, norm='l2', loss='margin'), .01)[0]
    assert _value('scaled_margin', weak)==1
    assert _value('scaled_margin', _case(_linear(), attacks=attacks, gap=.2))==0
    for norm,eps in (('l1', .5), ('l0', 2)):         # APGD has no steps for these
        attacks = PGD(eps, norm=norm, steps=1),
        assert _value('scaled_margin', _case(_linear(), attacks=attacks))==1
    net = Counting(_linear())
    _measure('scaled_margin', _case(net, gap=.2))
    assert net.calls==1+5+22+1                       # blind? random? APGD, and the network's word
    assert _measure('scaled_margin', _case(_blind())) is None
    # a deployed network is attacked through its fake-quantized one
    for scale,value in ((1., 1), (-1., 0)):
        assert _value('scaled_margin', _case(_blind(), fake_quantized=_linear(scale), gap=.09))==value

def test_the_margin_in_l1_is_climbed_by_pgd_with_as_many_passes():
    case = _case(_linear(), attacks=(PGD(.1, norm='l1'),))
    assert _by_margin(case, 20)==PGD(.1, norm='l1', steps=40) and _by_margin(_case(_linear()), 20).steps==20

def test_rescaled_logits_have_unit_size_and_a_constant_scale():
    net,x = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)),torch.rand(5, 1, 2, 2, requires_grad=True)
    for scale in (1e-20, 1., 1e6):
        big = Then(lambda x: net(x)*scale)
        out = Rescaled(big)(x)
        floor = 1e-12/scale if scale<1e-6 else 0
        torch.testing.assert_close(out, net(x)/net(x).std(1, keepdim=True).clamp_min(floor))
        grad = torch.autograd.grad(out[:,0].sum(), x)[0]
        rescaled = net(x)[:,0]/net(x).detach().std(1).clamp_min(floor)
        torch.testing.assert_close(grad, torch.autograd.grad(rescaled.sum(), x)[0])
    assert Rescaled(Then(lambda x: torch.zeros(2, 3)))(x).tolist()==[[0]*3]*2

def test_black_box():
    net = _linear()
    assert _value('black_box', _case(net))==1 and _value('black_box', _case(net, gap=.2))==0
    # that Square has run is no reason: the guard asks for what stands after it
    assert _value('black_box', _case(net, attacks=(PGD(.1), Square(.1, queries=5)), fallen=6))==.25
    assert _measure('black_box', _case(net, attacks=(Square(.1),))) is None
    assert 'random search' in _measure('black_box', _case(net))[1]
    for thorough,queries in (False, 100), (True, 2000):
        watched = Counting(net)
        _measure('black_box', _case(watched, 1, gap=.3, thorough=thorough))
        assert watched.calls==5+queries+1+1          # random? Square, and the network's word

def test_convergence():
    @dataclass(frozen=True)
    class Slow(Blacken):
        def craft(self, model, x, y, generator):
            seen.append(self.steps)
            return 1-x if self.steps>=6 else x
    net = _linear()
    seen.clear()
    value,says,one = _measure('convergence', _case(net, attacks=(Slow(1., 3),), fallen=4))
    assert (value, one)==(.5, 1/8) and seen==[6] and says.startswith('Slow with 6 steps instead of 3 takes 0.5')
    assert _value('convergence', _case(net, attacks=(Slow(1., 2),)))==0
    assert _value('convergence', _case(net, attacks=(FGSM(1.), Slow(1., 3))))==1
    # nothing to double: PGD
    value,says,_ = _measure('convergence', _case(net, attacks=(FGSM(.1),)))
    assert value==1 and says.startswith('PGD-10 with 10 steps instead of 1 ')
    assert _value('convergence', _case(net, attacks=(FGSM(.1),), gap=.2))==0
    assert _measure('convergence', _case(net, attacks=(Square(.1),))) is None
    assert _measure('convergence', _case(_blind())) is None
    assert _value('convergence', _case(_blind(), fake_quantized=net))==1
    many = _case(net, 600, attacks=(FGSM(.1),))
    _measure('convergence', many)
    assert many.judge.runs[-1].tried==200          # until an image is worth the limit

def test_an_average_has_the_steps_of_what_is_averaged():
    net,attack = _linear(),EOT(PGD(.1, steps=30), 2)
    assert _measure('convergence', _case(net, attacks=(attack,)))[1].startswith(
        'PGD-60 EOT-2 with 60 steps instead of 30 ')
    assert 'of 30 steps' in _measure('plateau', _case(net, attacks=(attack,)))[1]

def test_plateau():
    net = _linear()
    value = lambda steps: _value('plateau', _case(net, attacks=(FGSM(.1), PGD(.1, steps=steps)), gap=.2))
    assert value(10)==1 and .2<value(11)<1 and value(60)<1e-4
    for attack,what in ((FGSM(.1), '1 step '), (PGD(.1, steps=9), '9 steps ')):      # too short to say
        value,says = _measure('plateau', _case(net, attacks=(attack,), gap=.2))
        assert value==1 and says.startswith(f'an attack of {what}does not show')
    assert 'over the last ten of 10 steps' in _measure('plateau', _case(net, attacks=(PGD(.1),), gap=.2))[1]
    assert net[1].weight.requires_grad
    assert _measure('plateau', _case(net, attacks=(Square(.1),))) is None
    assert _measure('plateau', _case(_blind())) is None

def _rounding(net): return nn.Sequential(Then(lambda x: (x*100).round()/100), net).eval()

def test_surrogate():
    "Behind a rounding the gradient is zero; straight through it, and inside, it is the network's own"
    case = _case(_rounding(_linear()), 300)
    assert set(case.surrogates)=={'straight through', 'inside'} and case.has_way_around
    value,says,_ = _measure('surrogate', case)
    assert value==1 and 'a surrogate (straight through) take 1.0000' in says
    first = {k*300//128 for k in range(128)}
    rest = [k for k in range(300) if k not in first]
    then = {rest[k*172//128] for k in range(128)}
    said = ['guard surrogate, straight through' if k in first else 'guard surrogate, inside' if k in then else 'stands'
            for k in range(300)]
    assert case.judge.outcomes==said and said.count('stands')==44
    assert _value('surrogate', _case(_rounding(_linear()), gap=.2))==0
    assert _measure('surrogate', _case(_linear())) is None
    assert _measure('surrogate', _case(nn.Sequential(_linear()))) is None          # the same gradients inside
    assert _measure('surrogate', _case(_blind())) is not None

def test_transfer():
    net = _linear()
    child = _rounding(net)
    assert _value('transfer', _case(child, 300, parent=net))==1
    assert _value('transfer', _case(child, 300, parent=net, fallen=240))==pytest.approx(.2)
    assert _value('transfer', _case(child, 300, parent=net, gap=.2))==0
    few = _case(child, 300, parent=net, gap=.2, fallen=300)
    assert _value('transfer', few)==0 and 'take 0.0000 more' in _measure('transfer', few)[1]
    assert _measure('transfer', _case(child)) is None
    assert _measure('transfer', _case(child, attacks=(Square(.1),), parent=net)) is None

def test_agreement():
    net = _linear()
    fake = Then(lambda x: torch.where((x[:,0,0,0]>.6)[:,None], -net(x), net(x)))
    case = _case(net, 600, odd=150, fake_quantized=fake)
    assert _value('agreement', case)==.25 and _value('agreement', _case(net, fake_quantized=_linear()))==0
    assert _measure('agreement', _case(net)) is None

class _Flat(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, grad): return grad*0

def test_a_surrogate_has_another_gradient_for_some_image():
    "Between a cosine of .99 and one of .87, and for a single image of many"
    net = _linear()
    def one_pixel(x): return torch.where(last, (x*100).round()/100, x)
    last = torch.tensor([[0, 0], [0, 1]]).bool()
    assert 'straight through' in _case(nn.Sequential(Then(one_pixel), net)).surrogates
    def bright_only(x): return torch.where(x[:,:,:1,:1]>.6, (x*100).round()/100, x)
    assert 'straight through' in _case(nn.Sequential(Then(bright_only), net), odd=1).surrogates
    assert 'straight through' not in _case(nn.Sequential(Then(bright_only), net)).surrogates

def test_the_outermost_network_inside_is_a_surrogate_of_its_own():
    net = _linear()
    inner = nn.Sequential(Then(lambda x: (x*100).round()/100), net).eval()
    found = _case(Then(lambda x: inner((x*50).round()/50))).surrogates
    assert found['inside'].network is net and found['one layer inside'].network is inner

def test_a_way_around():
    "Logits with gradients, a parent, or a surrogate; on all images that the network gets right"
    net,w = _linear(),_linear()[1].weight.detach()
    def logits(x): return x.flatten(1)@w.T
    def flat(x): return _Flat.apply(logits(x))
    assert not _case(flat, 70).has_way_around and _case(flat, 70, parent=net).has_way_around
    assert _case(_blind(), 70).has_way_around                      # what detaches has a derivative straight through
    def saturated(x): return logits(x)*1e4
    case = _case(saturated, 70)
    assert not case.surrogates and case.has_way_around
    assert not _case(lambda x: torch.from_numpy(logits(x).detach().numpy()), 70).has_way_around

def test_attacks_whose_steps_are_said_elsewhere():
    "A class of torchattacks keeps them among its arguments; `Triage` climbs as long as there is hope"
    theirs = TorchAttack(torchattacks.PGD, .1, steps=20)
    assert 'of 20 steps' in _measure('plateau', _case(_linear(), attacks=(theirs,)))[1]
    assert 'with 40 steps instead of 20' in _measure('convergence', _case(_linear(), attacks=(theirs,)))[1]
    for name in 'plateau','convergence': assert _measure(name, _case(_linear(), attacks=(Triage(.1),))) is None

def test_a_judge_that_was_interrupted_asks_the_next_attack_anew():
    "What one attack had done is not taken for another's"
    judge = _case(_linear(), 4, odd=4).judge
    judge.bs = 2
    def stop(model): raise KeyboardInterrupt
    judge.after_batch = stop
    with pytest.raises(KeyboardInterrupt): judge.run('one', Blacken(1.))
    judge.after_batch = lambda judge: None
    assert judge.run('other', FGSM(0.), 1).tried==1 and judge.run('one', Blacken(1.)).robust==0
    assert judge.remaining==0 and [o.name for o in judge.runs]==['other', 'one']

def test_samples_see_all_of_images_that_lie_class_by_class():
    case = _case(_linear(), 600)
    case.judge.y = torch.arange(600)//300
    assert set(case.some()[1].tolist())=={0, 1}

def test_a_thorough_look_at_many_images_is_taken_in_batches():
    net,sizes = _linear(),[]
    def seen(x):
        sizes.append(len(x))
        return net(x)
    case = _case(Then(seen), 600, thorough=True)
    for name in ('determinism', 'probabilities', 'zero_gradient', 'plateau'): guards[name].find(name, case)
    assert max(sizes)==256 and sum(sizes)>600*(5+1+1)
