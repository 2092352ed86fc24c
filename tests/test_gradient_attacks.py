"Each attack by hand, on a linear network"
import pytest, torch, torch.nn.functional as F, torchattacks
from torch import nn
from adverfine.threat import ThreatModel
from adverfine.attacks.attack import Attack, cross_entropy, input_grad, logits_of, value_and_grad
from adverfine.attacks.gradient import FGSM, FGSMRS, NFGSM, PGD, worst_of
from adverfine.attacks.adaptive import Transfer
from adverfine.attacks.torchattacks import TorchAttack

class Spy(nn.Module):
    "Logits w x for class 0 and 0 for the others; keeps every batch it is asked about"
    def __init__(self, w=(1., -2, 3, -4), classes=3):
        super().__init__(); self.w,self.classes,self.seen = torch.tensor(w, dtype=torch.float64),classes,[]
    def forward(self, x):
        self.seen.append(x.detach().clone())
        return F.pad((x.flatten(1)@self.w.to(x.dtype))[:,None], (0, self.classes-1))

# the signs of its gradient, away from class 0
down = torch.tensor([-1., 1, -1, 1], dtype=torch.float64).view(1, 1, 2, 2)
grey,zeros = torch.full((2, 1, 2, 2), .5, dtype=torch.float64),torch.zeros(2, dtype=torch.long)
def _seed(n=0): return torch.Generator().manual_seed(n)
def _away(norm): return down if norm=='linf' else -Spy().w.view(1, 1, 2, 2)/Spy().w.norm()
norms = pytest.mark.parametrize('norm', ['linf', 'l2'])

@norms
def test_fgsm_is_one_step(norm):
    assert torch.allclose(FGSM(.1, norm=norm)(Spy(), grey, zeros), grey+.1*_away(norm))
    assert torch.allclose(FGSM(.7)(Spy(), grey, zeros), (grey+.7*down).clamp(0, 1))
    assert torch.allclose(FGSM(.7, clamp=False)(Spy(), grey, zeros), grey+.7*down)

@norms
def test_pgd_steps_are_two_and_a_half_eps_over_their_number(norm):
    for kw,step in [(dict(steps=5), .05), (dict(), .025), (dict(steps=4, step_size=.03), .03),
            (dict(steps=10, step_size=.2), .2)]:
        net = Spy()
        x_adv = PGD(.1, norm=norm, random_start=False, **kw)(net, grey, zeros)
        asked = torch.stack([*net.seen, x_adv])
        assert len(net.seen)==kw.get('steps', 10)
        expected = torch.stack([grey+min(k*step, .1)*_away(norm) for k in range(len(asked))])
        assert torch.allclose(asked, expected, atol=1e-6)

@norms
def test_pgd_starts_at_random_and_stays_in_the_ball(norm):
    net,attack = Spy(),PGD(.1, norm=norm, steps=3, step_size=.02)
    x_adv = attack(net, grey, zeros, _seed())
    start = attack.threat.random_start(grey, _seed())
    assert torch.equal(net.seen[0], start) and (start!=grey).any()
    for a,b in zip([*net.seen, x_adv], [*net.seen[1:], x_adv]):
        assert torch.allclose(attack.threat.project(a+.02*_away(norm), grey), b, atol=1e-6) or b is x_adv

@norms
@pytest.mark.parametrize('step_size', [None, .03])
def test_fgsm_rs_steps_one_and_a_quarter_eps_from_a_random_point(norm, step_size):
    net,attack = Spy(),FGSMRS(.1, step_size, norm=norm)
    x = grey.repeat(20, 1, 1, 1)
    x_adv = attack(net, x, zeros.repeat(20), _seed())
    assert torch.equal(net.seen[0], attack.threat.random_start(x, _seed()))
    long = net.seen[0]+(step_size or .125)*_away(norm)
    assert torch.allclose(x_adv, attack.threat.project(long, x)) and not torch.allclose(x_adv, long)

@norms
def test_n_fgsm_is_not_projected(norm):
    net,attack = Spy(),NFGSM(.1, norm=norm)
    x = grey.repeat(50, 1, 1, 1)
    x_adv = attack(net, x, zeros.repeat(50), _seed())
    far = attack.threat.distance(net.seen[0], x)
    assert .19<far.max()<=.2 and torch.allclose(x_adv, net.seen[0]+.1*_away(norm))
    assert attack.threat.distance(x_adv, x).max()>.25
    assert torch.allclose(NFGSM(.1, noise=0, norm=norm)(net, x, zeros.repeat(50)),
        FGSM(.1, norm=norm)(net, x, zeros.repeat(50)))
    edge = NFGSM(.4)(net, 2*grey-1e-3, zeros, _seed()),NFGSM(.4)(net, 0*grey, zeros, _seed())
    assert edge[0].max()==1 and edge[1].min()==0 and NFGSM(.4, clamp=False)(net, 2*grey, zeros, _seed()).max()>1

def test_fields_and_what_they_refuse():
    assert NFGSM(.5).noise==2 and NFGSM(.5).random_start and not NFGSM(.1, noise=0).random_start
    assert NFGSM(.1, noise=10).eps==.1
    for make,why in [(lambda: NFGSM(.51), 'between 0 and 1'), (lambda: NFGSM(.1, noise=-1), 'between 0 and 1'),
            (lambda: NFGSM(8), '8/255'), (lambda: FGSMRS(8), '8/255'), (lambda: PGD(8), '8/255'),
            (lambda: FGSM(.1, norm='l3'), "'l3'"), (lambda: NFGSM(1, norm='l0'), 'use PGD or Square'),
            (lambda: NFGSM(3, noise=-1, norm='l1'), 'noise=-1 must be 0 or more'),
                     (lambda: FGSMRS(.1, 0), 'step_size=0'), (lambda: PGD(.1, step_size=0), 'step_size=0'),
                     (lambda: PGD(.1, step_size=-.1), 'must be positive'), (lambda: PGD(.1, steps=0), 'steps=0'),
                     (lambda: PGD(.1, steps=1.5), 'steps=1.5'),
                     (lambda: PGD(.1, restarts=0), 'restarts=0'), (lambda: PGD(.1, restarts=2, random_start=False),
                     'would repeat one run')]:
        with pytest.raises(ValueError, match=why): make()
    assert PGD(.1, steps=1, restarts=1, random_start=False, step_size=1e-9).steps==1
    assert [o.name for o in (FGSM(.1), FGSMRS(.1), NFGSM(.1), PGD(.1), PGD(.1, restarts=2))]==['FGSM', 'FGSM-RS',
        'N-FGSM', 'PGD-10', 'PGD-10x2']
    assert [o.passes for o in (FGSM(.1), FGSMRS(.1), NFGSM(.1), PGD(.1), PGD(.1, 7, restarts=2))]==[2, 2, 2, 20, 30]
    for o in (FGSM(.1), FGSMRS(.1), NFGSM(.1), PGD(.1)):
        assert o.white_box and o.soft and o.clamp and o.norm=='linf' and o.parts==(o,) and o.threat==ThreatModel(.1)
    assert Attack.white_box and not Attack.soft

def test_restarts_keep_the_worst():
    x,y = torch.full((200, 1, 2, 2), .5, dtype=torch.float64),torch.zeros(200, dtype=torch.long)
    net = Spy(w=(1., 1, 1, 1))
    rough = lambda m: lambda o: torch.sin(40*m(o))
    runs = [PGD(.1, steps=1, step_size=1e-6)(rough(net), x, y, _seed(k)) for k in range(1)]
    twice = PGD(.1, steps=1, step_size=1e-6, restarts=4)(rough(net), x, y, _seed())
    loss = lambda o: cross_entropy(rough(net)(o), y)
    assert (loss(twice)>=loss(runs[0])-1e-9).all() and (loss(twice)>loss(runs[0])+.1).any()

def _as_images(logits): return torch.tensor(logits, dtype=torch.float64)[:,None,None]

def test_worst_of_prefers_what_is_misclassified():
    "Though its loss is smaller: log 2 against log 3"
    model = lambda x: x[:,0,0]
    unsure,wrong = [0.01, 0, 0],[0., .02, -9]
    for order in (0, 1):
        a,b = (_as_images([o, o]) for o in ((unsure, wrong), (wrong, unsure))[order])
        assert worst_of([a, b], model, torch.tensor([0, 0])).tolist()==_as_images([wrong, wrong]).tolist()

def test_worst_of_takes_the_highest_loss_of_each_image():
    model = lambda x: x[:,0,0]
    y = torch.tensor([0, 1])
    batches = [_as_images(o) for o in ([[3., 0, 0], [0, 5, 0]], [[2., 0, 0], [0, 1, 0]], [[1., 0, 0], [0, 3, 0]],
        [[1.5, 0, 0], [0, 1.5, 0]])]
    assert torch.equal(worst_of(batches, model, y), _as_images([[1., 0, 0], [0, 1, 0]]))
    same = [_as_images([[0., 3], [0, 3]]), _as_images([[1., 4], [1, 4]])]
    assert torch.equal(worst_of(same, model, y), same[0])                # of equals the first
    soft = torch.tensor([[.9, .1, 0], [.1, .9, 0]])                      # probabilities have no misclassified
    assert torch.equal(worst_of(batches[:2], model, soft), batches[1])

def test_soft_labels():
    hard,soft = PGD(.1, random_start=False),F.one_hot(zeros, 3).float()
    assert torch.equal(hard(Spy(), grey, zeros), hard(Spy(), grey, soft))
    with pytest.raises(ValueError, match='2 classes, but the model knows 3'): hard(Spy(), grey, soft[:,:2])
    class Hard(Attack): pass
    with pytest.raises(ValueError, match='not probabilities'): Hard(.1)(Spy(), grey, soft)
    for y in (soft.long(), zeros.float(), zeros[:1], soft[:1]):
        with pytest.raises(ValueError, match='whole numbers'): hard(Spy(), grey, y)
    with pytest.raises(NotImplementedError): Hard(.1)(Spy(), grey, zeros)

def test_labels_and_logits_are_looked_at_once():
    FGSM(.1)(Spy(), grey, zeros+2)
    for bad in (3, -1):
        with pytest.raises(ValueError, match='labels must be 0 to 2'): FGSM(.1)(Spy(), grey, torch.tensor([1, bad]))
    for model,why in [(lambda x: x, r'not \(2, 1, 2, 2\)'), (lambda x: Spy()(x)[:1], r'not \(1, 3\)'),
            (lambda x: Spy()(x)*float('nan'), 'NaN logits'), (lambda x: [Spy()(x)], 'not list'),
            (lambda x: Spy()(x).detach(), 'gives no gradients')]:
        with pytest.raises(ValueError, match=why): FGSM(.1)(model, grey, zeros)
        with pytest.raises(ValueError): value_and_grad(model, grey, zeros)
        if 'gradients' not in why:
            with pytest.raises(ValueError, match=why): logits_of(model, grey, zeros)
    with pytest.raises(ValueError, match='in \\[0,1\\]'): FGSM(.1)(Spy(), grey+1, zeros)
    one_nan = lambda x: torch.where(torch.eye(2, 3).bool(), float('nan'), Spy()(x))
    with pytest.raises(ValueError, match='NaN logits'): logits_of(one_nan, grey, zeros)
    class Late(Spy):
        def forward(self, x): return super().forward(x) if not self.seen else super().forward(x)[:,:2]
    PGD(.1, steps=3)(Late(), grey, zeros+2*0)                            # a change that a second look would have seen
    with pytest.raises(ValueError): FGSM(.1)(lambda x: Spy()(x)[:,:1], grey, zeros+1)

def test_value_and_grad_is_of_each_image_alone():
    net,x = Spy(),torch.rand(3, 1, 2, 2, generator=_seed(), dtype=torch.float64)
    y = torch.tensor([0, 1, 2])
    out,each,grad = value_and_grad(net, x, y)
    assert out.dtype==torch.float32 and not out.requires_grad and not each.requires_grad
    torch.testing.assert_close(out, net(x).float())
    torch.testing.assert_close(each, F.cross_entropy(net(x).float(), y, reduction='none'))
    p = net(x).softmax(1)
    expected = (p[:,0]-(y==0).double())[:,None]*net.w
    torch.testing.assert_close(grad.flatten(1), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(input_grad(net, x, y), grad)
    torch.testing.assert_close(value_and_grad(net, x, y, lambda o,y: o[:,0])[2].flatten(1), net.w.expand(3, 4))
    net.seen.clear()
    with pytest.raises(ValueError): value_and_grad(net, x, y+1)
    with pytest.raises(ValueError): input_grad(net, x, y+1)

class Half(nn.Module):
    "Logits in float16"
    def __init__(self, w): super().__init__(); self.w = torch.tensor(w, dtype=torch.float16)
    def forward(self, x): return F.pad((x.flatten(1).half()@self.w)[:,None], (0, 1))

def test_gradients_in_float16_neither_vanish_nor_overflow():
    x,y = torch.full((1, 1, 2, 2), .5),torch.tensor([0])
    for w in ([8., 8, 8, 8], [9.5]*4, [3000., -3000, 3000, -3000], [-60000., 60000, 60000, -60000]):
        grad = input_grad(Half(w), x, y).flatten()
        p = 1-Half(w)(x).float().softmax(1)[0,0]
        torch.testing.assert_close(grad, -p*torch.tensor(w), rtol=.02, atol=0)
    assert 0<input_grad(Half([8.]*4), x, y).abs().max()<1e-5
    class Infinite(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z): return z.half()
        @staticmethod
        def backward(ctx, g):
            return torch.stack([g[:,0]*0+float('inf'), g[:,1]*0-float('inf'), g[:,2]*0+float('nan')], 1)
    grad = input_grad(lambda x: Infinite.apply(x.flatten(1)[:,:3]), x, y)
    # in the end what is not finite counts for nothing
    assert torch.equal(grad, torch.zeros_like(grad))
    part = lambda x: torch.cat([Infinite.apply(x.flatten(1)[:,:3])[:,:1]*0, Half([1., 2, 3, 4])(x)], 1)
    assert input_grad(part, x, y).isfinite().all()

def test_transfer_crafts_on_its_surrogate():
    surrogate,asked = Spy(),Spy(w=(-1., -1, -1, -1))
    attack = Transfer(FGSM(.1, norm='l2', clamp=False), surrogate)
    x_adv = attack(asked, grey, zeros)
    assert torch.equal(x_adv, FGSM(.1, norm='l2', clamp=False)(surrogate, grey, zeros)) and not asked.seen
    assert not attack.white_box and attack.threat==ThreatModel(.1, 'l2', False) and attack.passes==2
    assert attack.name=='FGSM transferred'

def test_torchattacks_settings():
    for make,why in [(lambda: TorchAttack(torchattacks.PGD(nn.Linear(1, 1)), .1), 'is no class'),
            (lambda: TorchAttack(torchattacks.PGD, .1, stepz=3), 'does not take stepz'),
            (lambda: TorchAttack(torchattacks.PGD, 8), '8/255')]:
        with pytest.raises(ValueError, match=why): make()
    assert [TorchAttack(torchattacks.PGD, .1, **kw).passes for kw in (dict(), dict(steps=7))]==[21, 15]
    assert TorchAttack(torchattacks.Pixle, .1).passes==201
    assert TorchAttack(torchattacks.PGD, .1).name=='torchattacks PGD'

class Shifted(torchattacks.attack.Attack):
    "Moves the images by what it is told; has no eps of its own"
    def __init__(self, model, by=0., seed=0):
        super().__init__('Shifted', model)
        given.append(seed)
        self.by = by
    def forward(self, images, labels): return images+self.by

class Bounded(Shifted):
    def __init__(self, model, eps=0., norm='x', n_classes=0, by=0.):
        super().__init__(model, by)
        given.append((eps, norm, n_classes))

given = []

def test_torchattacks_without_a_budget_are_cut_to_it():
    x = torch.full((2, 1, 2, 2), .5)
    by = torch.tensor([.1, .3]).view(2, 1, 1, 1)
    x_adv = TorchAttack(Shifted, .2, by=by)(Spy(), x, zeros)
    assert torch.allclose(x_adv[0], x[0]+.1) and torch.equal(x_adv[1], x[1])
    assert torch.allclose(TorchAttack(Shifted, .25, by=.25)(Spy(), x, zeros), x+.25)
    with pytest.raises(ValueError, match='left its budget'): TorchAttack(Bounded, .2, by=.3)(Spy(), x, zeros)
    for norm,name in dict(linf='Linf', l2='L2').items():
        given.clear()
        TorchAttack(Bounded, .2, norm=norm)(Spy(), x, zeros)
        assert given[-1]==(.2, name, 3)
    given.clear()
    for seed in (1, 1, 2): TorchAttack(Shifted, .2)(Spy(), x, zeros, _seed(seed))
    assert given[0]==given[1]!=given[2] and 0<=min(given) and max(given)<2**31
