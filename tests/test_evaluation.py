"The attack suite against torchattacks, the guards against networks that mask, and evaluations that go wrong"
import contextlib, copy, inspect, io, json
import pytest, torch, torchattacks
from torch import nn
from fastai.vision.all import Learner, set_seed
from adverfine.threat import pixel_space, ThreatModel
from adverfine.networks.zoo import cnn8
from adverfine.networks.modes import evaluating
from adverfine.networks import fastest, timings
from adverfine.networks.precision import bf16_is_fast
from adverfine.data.pixels import pixels
from adverfine.data.sources import digits_dls
from adverfine.attacks.attack import Attack
from adverfine.attacks.scoring import Scorer
from adverfine.attacks.gradient import FGSM, PGD
from adverfine.attacks.adaptive import Transfer
from adverfine.attacks.torchattacks import TorchAttack
from adverfine.attacks.apgd import APGD
from adverfine.attacks.fab import FAB
from adverfine.attacks.square import Square
from adverfine.attacks.autoattack import AutoAttack
from adverfine.compression.quantization import quantize
from adverfine.evaluation.cases import Case, guards
from adverfine.evaluation.robustness import evaluate
from adverfine.training.adversarial import AdversarialTraining
import fastai.callback.progress, fastai.callback.schedule  # noqa: F401 verbs of a Learner

@pytest.fixture(scope='module')
def learn():
    set_seed(0)
    learn = Learner(digits_dls(), cnn8(size=8))
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(12, 5e-3, cbs=AdversarialTraining(PGD(.1, steps=3)))
    return learn

@pytest.fixture(scope='module')
def model(learn): return learn.model.eval()

@pytest.fixture(scope='module')
def right(learn, model):
    "Test images that the network gets right"
    x,y = pixels(learn.dls.test)
    ok = model(x).argmax(1)==y
    return x[ok],y[ok]

def _stand(model, x_adv, y): return (model(x_adv).argmax(1)==y).sum().item()
def _seed(s): return torch.Generator().manual_seed(s)

# ---- attacks

eps = dict(linf=.1, l2=.6)
their_norms = dict(linf='Linf', l2='L2')
peers = dict(
    ce=(lambda e, n: APGD(e, norm=n, steps=10),
        lambda m, **kw: torchattacks.APGD(m, steps=10, **kw)),
    targeted=(lambda e, n: APGD(e, norm=n, steps=10, loss='dlr', targets=9),
              lambda m, **kw: torchattacks.APGDT(m, steps=10, **kw)),
    fab=(lambda e, n: FAB(e, norm=n, steps=10),
         lambda m, **kw: torchattacks.FAB(m, steps=10, multi_targeted=True, n_classes=10, **kw)))

@pytest.mark.parametrize('norm', eps)
@pytest.mark.parametrize('name', peers)
def test_as_strong_as_torchattacks(model, right, name, norm):
    ours,theirs = peers[name]
    mine = _stand(model, ours(eps[norm], norm)(model, *right, _seed(0)), right[1])
    other = _stand(model, theirs(model, eps=eps[norm], norm=their_norms[norm])(*right), right[1])
    assert abs(mine-other)<=2

@pytest.mark.parametrize('norm', eps)
def test_square_is_no_weaker_than_torchattacks(model, right, norm):
    x,y = (o[:200] for o in right)
    mine = _stand(model, Square(eps[norm], norm=norm, queries=300)(model, x, y, _seed(0)), y)
    theirs = torchattacks.Square(model, eps=eps[norm], norm=their_norms[norm], n_queries=300, resc_schedule=False)
    other = _stand(model, theirs(x, y), y)
    assert mine<=other+2

def test_autoattack_is_the_published_protocol():
    ce,t,fab,square = AutoAttack(.1).parts
    assert (ce.loss, ce.steps, ce.targets, ce.restarts)==('ce', 100, 0, 1)
    assert (t.steps, t.targets)==(100, 9)
    assert (fab.steps, fab.targets)==(100, 9)
    assert square.queries==5000
    assert AutoAttack(.1).name=='AutoAttack' and AutoAttack(.1, version='fast').name!='AutoAttack'
    assert all(o.threat==ThreatModel(.3, 'l2') for o in AutoAttack(.3, norm='l2').parts)

@pytest.mark.parametrize('norm', eps)
@pytest.mark.parametrize('size', [1, 3, 9])
def test_budget_on_any_size(norm, size):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(2*size*size, 5))
    x = torch.rand(6, 2, size, size)
    y = net(x).argmax(1)
    for attack in (
            APGD(.1, norm=norm, steps=5),
            APGD(.1, norm=norm, steps=5, loss='dlr', targets=9),
            FAB(.1, norm=norm, steps=5),
            Square(.1, norm=norm, queries=30),
            AutoAttack(.1, norm=norm, version='fast')):
        attack.threat.check(attack(net, x, y), x)

def test_bf16_finds_as_much(learn):
    a,b = (learn.robustness([APGD(.1, steps=30), Square(.1, queries=200)], bf16=o).robust for o in (False, True))
    assert abs(a-b)<=.01

def _is_attack(o):
    "Is `o` a class of torchattacks.attacks?"
    if not inspect.isclass(o) or not issubclass(o, torchattacks.attack.Attack): return False
    return o.__module__.startswith('torchattacks.attacks.')

classes = [o for o in vars(torchattacks).values() if _is_attack(o)]
# arguments that make the slow ones quick
few = dict(
    AutoAttack=dict(),
    Square=dict(n_queries=20),
    CW=dict(steps=5),
    OnePixel=dict(steps=2, popsize=4, inf_batch=10),
    Pixle=dict(max_iterations=2, restarts=2),
    SparseFool=dict(steps=2),
    DeepFool=dict(steps=3),
    EOTPGD=dict(steps=2))

@pytest.mark.parametrize('kind', classes, ids=lambda o: o.__name__)
def test_any_attack_of_torchattacks(learn, kind):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(),
                        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    net[1].eval()
    flags = [m.training for m in net.modules()]
    x,y = torch.rand(3, 3, 16, 16),torch.tensor([1, 2, 3])
    state = torch.get_rng_state()
    name = kind.__name__
    norm = 'l2' if name in ('CW', 'PGDL2', 'PGDRSL2', 'DeepFool') else 'linf'
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        attack = TorchAttack(kind, .1, norm=norm, **few.get(name, {}))
        x_adv = attack(net, x, y, _seed(0))
        again = attack(net, x, y, _seed(0))
    attack.threat.check(x_adv, x)
    assert torch.equal(x_adv, again)
    assert [m.training for m in net.modules()]==flags
    assert torch.equal(state, torch.get_rng_state())
    assert not out.getvalue()
    assert all(p.requires_grad for p in net.parameters())

def test_torchattacks_on_a_normalised_learner():
    "fastai's tensors, a normalised DataLoader: the same figure as our PGD from the same start"
    set_seed(0)
    learn = Learner(digits_dls(normalize=(.5,.5)), cnn8(size=8))
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(6, 5e-3)
    ours = learn.robustness(PGD(.1, steps=10, step_size=.02, random_start=False), n=200).robust
    peer = TorchAttack(torchattacks.PGD, .1, steps=10, alpha=.02, random_start=False)
    theirs = learn.robustness(peer, n=200).robust
    assert abs(ours-theirs)<=.01

class Liar(Attack):
    def craft(self, model, x, y, generator): return (x+2*self.eps).clamp(0, 1)

class LiarTorch(torchattacks.PGD):
    def forward(self, images, labels): return (images+.5).clamp(0, 1)

def test_an_attack_that_leaves_its_budget(model, right):
    with pytest.raises(ValueError, match='Liar left its budget'): evaluate(model, *right, Liar(.1))
    with pytest.raises(ValueError, match='LiarTorch left its budget'):
        evaluate(model, *right, TorchAttack(LiarTorch, .1))

# ---- guards

class Then(nn.Module):
    def __init__(self, f): super().__init__(); self.f = f
    def forward(self, x): return self.f(x)

masks = dict(
    rounding=(lambda m: nn.Sequential(Then(lambda x: (x*8).round()/8), m), 'zero_gradient'),
    temperature=(lambda m: nn.Sequential(m, Then(lambda z: z*1000)), 'scaled_margin'),
    noise=(lambda m: nn.Sequential(Then(lambda x: x+.1*torch.randn_like(x)), m), 'determinism'),
    int_quantizer=(lambda m: nn.Sequential(*m[:4], Then(lambda h: (h*4).round()/4), *m[4:]), 'zero_gradient'),
    probabilities=(lambda m: nn.Sequential(m, Then(lambda z: z.softmax(1))), 'probabilities'))

def _flagged(report): return {o.guard for o in report.findings if not o.ok}

@pytest.mark.parametrize('name', masks)
@pytest.mark.parametrize('attack', [PGD(.1, steps=20), AutoAttack(.1, version='fast')], ids=lambda a: a.name)
def test_masked_networks_are_caught(model, right, name, attack):
    mask,guard = masks[name]
    torch.manual_seed(0)
    report = evaluate(mask(model), *(o[:150] for o in right), attack)
    assert report.verdict=='gradient masking' and not report.broken
    flagged = _flagged(report)
    assert guard in flagged or (name=='temperature' and 'zero_gradient' in flagged)

def test_an_honest_network_is_trusted(learn):
    attacks = [APGD(.05, steps=100), APGD(.05, steps=100, loss='dlr')]
    report = learn.robustness(attacks, thorough=True, parent=learn.model)
    assert report.verdict=='trusted', report
    assert {'convergence', 'plateau', 'transfer'} <= {o.guard for o in report.findings}

def test_a_weak_attack_is_not_trusted(learn):
    weak = PGD(.15, steps=1, step_size=.01, random_start=False)
    assert 'scaled_margin' in _flagged(learn.robustness(weak))

def test_transfer_from_the_parent_betrays_a_masked_child(model, right):
    case = Case(Scorer(masks['rounding'][0](model), *right), (PGD(.1, steps=20),), parent=model)
    case.judge.run('PGD-20', *case.attacks)
    found = guards['transfer'].find('transfer', case)   # alone: other guards would fool the same images first
    assert not found.ok and found.value>.1

def test_a_fake_quantized_network_that_is_another(model, right):
    report = evaluate(lambda x: model(x).detach(), *right, PGD(.1, steps=5), fake_quantized=cnn8(size=8))
    assert 'agreement' in _flagged(report)

# ---- the report

def test_fields_agree(learn):
    report = learn.robustness([Square(.1, queries=50), PGD(.1, steps=10), FGSM(.1)], n=200)
    assert [a.name for a in report.attacks]==['FGSM', 'PGD-10', 'Square']     # in order of cost
    accuracies = list(report.robust_after.values())
    assert accuracies==sorted(accuracies, reverse=True) and report.robust==accuracies[-1]
    images = report.images()
    assert len(images)==200 and images.clean.mean()==report.clean and images.robust.mean()==report.robust
    assert images['PGD-10'].mean()==report.robust_after['PGD-10']
    classes = report.per_class()
    assert (classes.n*classes.robust).sum()==pytest.approx(200*report.robust)
    d = json.loads(report.to_json())
    assert d['robust']==report.robust and len(d['outcomes'])==200 and d['verdict']==report.verdict
    assert report.examples
    for x,x_adv,y,pred,_ in report.examples:
        assert y!=pred and (x_adv-x).abs().max()<=.1+1e-6
        assert learn.model(x_adv[None]).argmax().item()==pred
    assert report.verdict in report._repr_html_() and 'FGSM' in str(report)

def test_seed_fixes_everything(learn):
    a,b = (learn.robustness([PGD(.1), Square(.1, queries=50)], n=100, seed=3) for _ in range(2))
    assert a.outcomes==b.outcomes and a.labels==b.labels

def test_nothing_right_nothing_to_attack(model, right):
    x,y = right
    report = evaluate(model, x, (y+1)%10, AutoAttack(.1))
    assert report.clean==report.robust==0 and set(report.outcomes)=={'wrong'}
    report.plot(); report.to_html()

# ---- what goes wrong

def _bad(model):
    "Functions that are no classifier of 50 images into 10 classes, and what is said about each"
    return dict(
        tuples=(lambda x: (model(x),), 'not tuple'),
        classes=(lambda x: model(x)[:,:5], 'knows 5 classes'),
        batch=(lambda x: model(x)[:-1], 'for 50 images'),
        nan=(lambda x: model(x)*float('nan'), 'NaN logits'),
        images=(lambda x: x, 'must return logits'),
        blind=(lambda x: model(x).detach(), 'gives no gradients'))

@pytest.mark.parametrize('name', ['tuples', 'classes', 'batch', 'nan', 'images', 'blind'])
def test_bad_models(model, right, name):
    bad,why = _bad(model)[name]
    with pytest.raises(ValueError, match=why): evaluate(bad, *(o[:50] for o in right), PGD(.1))

def test_nan_only_on_adversarial_images(model, right):
    "The images of the digits are whole sixteenths; what is adversarial is not"
    x,y = (o[:50] for o in right)
    def fragile(b):
        moved = (b*16-(b*16).round()).abs().max()>.01
        return model(b)*(float('nan') if moved else 1)
    with pytest.raises(ValueError, match='NaN logits'): evaluate(fragile, x, y, PGD(.1))

def test_few_classes(right):
    "Targets are capped by the wrong classes that there are; one class leaves nothing to aim at"
    x = right[0][:20]
    for classes in (2, 3):
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
        y = net(x).argmax(1)
        assert evaluate(net, x, y, [APGD(1., loss='dlr', targets=9, steps=5), FAB(1., steps=5)]).robust<1
        assert evaluate(net, x, y, AutoAttack(.01, version='fast')).clean==1
    one = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
    for attack in (APGD(.1, loss='dlr'), APGD(.1, loss='dlr', targets=9), FAB(.1), AutoAttack(.1)):
        with pytest.raises(ValueError, match='needs 2 classes or more, the model has 1'):
            evaluate(one, x, torch.zeros(20, dtype=torch.long), attack)

def test_bad_arguments(learn, model, right):
    for make,why in [
            (lambda: APGD(.1, loss='dl'), "'ce', 'dlr', 'margin', 'pma'"),
            (lambda: AutoAttack(.1, version='plus'), "'standard', 'fast'"),
            (lambda: Square(.1, queries=0), 'queries=0'),
            (lambda: TorchAttack(torchattacks.PGD, 8), '8/255'),
            (lambda: TorchAttack(torchattacks.PGD(model), .1), 'no class'),
            (lambda: learn.robustness(PGD(.1), n=10**6), 'there are 500 images'),
            (lambda: learn.robustness(PGD(.1), n=0), 'n=0'),
            (lambda: learn.robustness([]), 'attacks is empty'),
            (lambda: evaluate(model, right[0], right[1][:3], PGD(.1)), 'every image needs one'),
            (lambda: evaluate(model, *right, [PGD(.1), torchattacks.FGSM(model)]), r'TorchAttack\(torchattacks.FGSM')]:
        with pytest.raises(ValueError, match=why): make()

def _state(net):
    "All of a network that an evaluation might change"
    return ([m.training for m in net.modules()],
            [(p.requires_grad, p.grad, p.stride(), p.data_ptr(), p.tolist()) for p in net.parameters()],
            [b.tolist() for b in net.buffers()],
            [(len(m._forward_hooks), len(m._forward_pre_hooks), 'forward' in vars(m)) for m in net.modules()])

class Impatient(nn.Module):
    "Interrupted in its twelfth call"
    def __init__(self, net):
        super().__init__()
        self.net = net
        self.calls = 0
    def forward(self, x):
        self.calls += 1
        if self.calls==12: raise KeyboardInterrupt
        return self.net(x)

@pytest.mark.parametrize('bf16', [False, True])
@pytest.mark.parametrize('attack', [PGD(.1, steps=20), AutoAttack(.1)], ids=lambda a: a.name)
def test_an_interruption_leaves_the_model_as_it_was(right, bf16, attack):
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
                        nn.Conv2d(8, 8, 3), nn.Dropout(), nn.Flatten(), nn.Linear(128, 10)).train()
    net[1].eval()
    net[0].bias.requires_grad_(False)
    before = _state(net)
    with evaluating(net), torch.no_grad(): y = net(right[0]).argmax(1)
    with pytest.raises(KeyboardInterrupt): evaluate(Impatient(net), right[0], y, attack, bf16=bf16)
    assert _state(net)==before and not torch.is_autocast_enabled('cpu')

def test_functions_that_are_no_modules(model, right):
    "Differentiable or not: what cannot be climbed is searched, and the report says so"
    x,y = (o[:100] for o in right)
    attack = PGD(.1, steps=10)
    as_function = evaluate(lambda x: model(x), x, y, attack)
    assert as_function.robust==evaluate(model, x, y, attack, bf16=False).robust
    through_numpy = lambda x: torch.from_numpy(model(x).detach().numpy())
    report = evaluate(through_numpy, x, y, [Square(.1, queries=100), Transfer(attack, model)])
    assert report.robust<1 and not report.curve
    assert any('black-box attacks and transfer only' in o for o in report.reasons)

def test_a_compiled_network(model, right):
    x,y = (o[:60] for o in right)
    attack = PGD(.1, steps=5)
    compiled = torch.compile(model, backend='aot_eager')
    assert evaluate(compiled, x, y, attack).outcomes==evaluate(model, x, y, attack, bf16=False).outcomes

def test_blind_and_thorough(model, right):
    "No guard that needs gradients asks a network for them that has none"
    x,y = (o[:20] for o in right)
    report = evaluate(lambda b: model(b).detach(), x, y, [Transfer(PGD(.1, steps=3), model)], thorough=True)
    assert not {'zero_gradient', 'plateau', 'convergence', 'unbounded'} & {o.guard for o in report.findings}

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU here')
def test_on_a_gpu():
    set_seed(0)
    learn = Learner(digits_dls(normalize=(.5,.5)), cnn8(size=8))
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 3e-3)
    attacks = [AutoAttack(.1, version='fast'), FAB(.1, steps=5), TorchAttack(torchattacks.PGD, .1, steps=5)]
    reports = [learn.robustness(attacks, bf16=o, n=200, thorough=True) for o in (False, True)]
    assert abs(reports[0].robust-reports[1].robust)<=.02
    for norm,eps in dict(linf=.3, l2=2.).items():
        report = learn.robustness(Square(eps, norm=norm, queries=50), n=50)
        assert report.robust<report.clean

def test_quantized_networks_are_attacked_in_float32(model, right, monkeypatch, tmp_path):
    "bfloat16 rounds a value over the edge of a step, and attacks another network"
    small = copy.deepcopy(model)
    assert evaluate(small, *right, FGSM(.1)).bf16<=bf16_is_fast()
    monkeypatch.setattr(fastest, 'bf16_is_fast', lambda device: True)
    monkeypatch.setattr(fastest, '_times', lambda forms, x: {name: .5 if 'bf16' in name else 1. for name in forms})
    monkeypatch.setattr(timings, '_known', {})
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    assert evaluate(small, *right, FGSM(.1)).bf16
    quantize(small, 1, [right[0][:64]])
    assert not evaluate(small, *right, FGSM(.1)).bf16

def test_nothing_right_and_quantized(model, right):
    small = copy.deepcopy(model)
    quantize(small, 8, [right[0][:64]])
    with torch.no_grad(): wrong = (small(right[0]).argmax(1)+1)%10
    assert evaluate(small, right[0], wrong, PGD(.1)).clean==0

def test_pixels_for_a_network_that_wants_normalised_images_are_refused():
    learn = Learner(digits_dls(normalize=(.5,.25), n_train=300), cnn8(size=8))
    x,y = (o[:40] for o in pixels(learn.dls.test))
    space,attack = pixel_space(learn.dls),PGD(.1, steps=2)
    wrapped = space.wrap(learn.model)
    why = r'pixel_space\(dls\)\.wrap\(learn\.model\).*learn\.robustness'
    for given in (x, x[:7], x.clone(), torch.cat([x, x])[:40], x.to(torch.float32)):
        with pytest.raises(ValueError, match=why): evaluate(learn.model, given, y[:len(given)], attack, progress=False)
        with pytest.raises(ValueError, match=why): attack(learn.model, given, y[:len(given)])
    with pytest.raises(ValueError, match=why): evaluate(wrapped, x, y, Transfer(attack, learn.model), progress=False)
    with pytest.raises(ValueError, match=why): Transfer(attack, learn.model)(wrapped, x, y)
    report = evaluate(nn.Sequential(wrapped), x, y, attack, progress=False)
    assert report.clean==evaluate(lambda o: wrapped(o), x, y, Square(.1, queries=5), progress=False).clean
    evaluate(learn.model, x.as_subclass(torch.Tensor), y, attack, progress=False)
    assert type(attack(wrapped, x, y)) is torch.Tensor and type(y) is torch.Tensor
    assert type(pixels(digits_dls(n_train=300).test)[0]) is torch.Tensor
