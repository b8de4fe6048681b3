//! Drives a member: joins, keeps the session, and carries out what each machine's state asks for.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use futures::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use tokio::{
    sync::{Semaphore, mpsc, watch},
    time::{Instant, sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    Gone, LiveSession, Membership, RunReport, Shared, lock,
    machine::{Effect, Event, Machine, OwnerRecord, Seen, Wrote},
    message::{self, Call, Letter, Run, StoredValue, Yours, micros},
    session::{self, Renewal, Session, Times},
    share::{Keeper, Told},
};
use crate::{
    ErrorKind, FencingToken, InstallId, Key, MemberId, Notice, NoticeStream, Precondition, Result, StateStore,
    StateStoreExt, VmId, error::reason, state::MAX_PAGE,
};

/// So many questions to the store are under way at once.
const AT_ONCE: usize = 64;
/// So many renewals a watch stands that is not renewed.
const WATCH_TICKS: u32 = 3;
/// The longest pause before another try to join.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Owner records of the dead are left alone for so long: clocks differ.
const SWEEP_AGE: Duration = Duration::from_secs(3600);

/// How a session ended.
enum Ending {
    Lost,
    Left,
}

/// The fleet's own task: joins, and joins again, until it is told to leave.
pub(super) async fn run(shared: Arc<Shared>) {
    let mut pause = shared.times.pause();
    let mut told = false;
    let leaving = shared.leaving.clone();
    loop {
        let joined = tokio::select! {
            joined = join(&shared) => joined,
            () = leaving.cancelled() => break,
        };
        let (session, notices) = match joined {
            Ok(joined) => joined,
            Err(error) => {
                if !std::mem::replace(&mut told, true) {
                    tracing::warn!(%error, "the other executors' store is not reached; nothing runs until it is");
                }
                tokio::select! {
                    () = sleep(pause) => {}
                    () = leaving.cancelled() => break,
                }
                pause = (pause * 2).min(LONGEST_PAUSE);
                continue;
            }
        };
        (pause, told) = (shared.times.pause(), false);
        let member = session.member;
        tracing::info!(%member, "joined the executors that share this store");
        let (ending, calls) = Actor::new(&shared, &session).serve(session, notices).await;
        shared.tasks.spawn(give_back(Arc::clone(&shared), member, calls));
        match ending {
            Ending::Left => break,
            Ending::Lost => {
                tracing::warn!(%member, "the session with the other executors is lost; nothing runs until there is a new one");
                shared.membership.send_replace(Membership::Lost);
            }
        }
    }
    shared.membership.send_replace(Membership::Left);
}

/// Ends a session's lease before it runs out: nothing of it acts any more when its calls have ended.
async fn give_back(shared: Arc<Shared>, member: MemberId, calls: TaskTracker) {
    calls.close();
    if timeout(shared.times.answer(), calls.wait()).await.is_err() {
        return;
    }
    if let Err(error) = session::end(&shared.store, member, shared.times).await {
        tracing::debug!(%member, %error, "a session's lease was not given back; it runs out by itself");
        return;
    }
    shared.call(Call::Left(member)).await;
}

struct Notices {
    own: NoticeStream,
    all: NoticeStream,
}

async fn join(shared: &Arc<Shared>) -> Result<(Session, Notices)> {
    let member = MemberId::random();
    // Before the lease: who knows of a member may send to it.
    let own = shared.signals.listen(&message::member_topic(member)?).await?;
    let all = shared.signals.listen(&message::fleet_topic()?).await?;
    let session = Session::begin(&shared.store, member, shared.times).await?;
    Ok((session, Notices { own, all }))
}

/// Renews a session until it is lost, and says so in time.
async fn keep(shared: Arc<Shared>, mut session: Session, ticks: mpsc::Sender<()>, over: CancellationToken) {
    let _over = over.clone().drop_guard();
    loop {
        let stops = session.stops();
        tokio::select! {
            () = session.until_renewal() => {}
            () = over.cancelled() => return,
        }
        let renewed = loop {
            // The session stops in time also while a renewal waits for its answer: `renew` is bounded by it.
            match session.renew(&shared.store).await {
                Renewal::Done => break true,
                Renewal::Lost => break false,
                Renewal::Failed(error) => {
                    tracing::debug!(member = %session.member, %error, "a renewal failed");
                    if Instant::now() + shared.times.pause() >= stops {
                        tokio::time::sleep_until(stops).await;
                        break false;
                    }
                    sleep(shared.times.pause()).await;
                }
            }
        };
        if !renewed || over.is_cancelled() {
            return;
        }
        if let Some(live) = &mut lock(&shared.live).session
            && live.member == session.member
        {
            live.stops = session.stops();
        }
        // A tick that the actor has not taken yet stands for this one too.
        let _ = ticks.try_send(());
    }
}

/// What a question to the store came to.
struct Answer {
    vm: VmId,
    event: Event,
    /// For the closing of a gate: which closing.
    closing: Option<u64>,
}

struct Actor<'a> {
    shared: &'a Arc<Shared>,
    me: MemberId,
    machines: HashMap<VmId, Entry>,
    /// Machines whose conditions others watch, which ones, who, and for how many ticks yet.
    followers: HashMap<VmId, BTreeMap<InstallId, BTreeMap<MemberId, u32>>>,
    letters: HashMap<MemberId, Letter>,
    questions: FuturesUnordered<BoxFuture<'static, Answer>>,
    posts: FuturesUnordered<BoxFuture<'static, Option<MemberId>>>,
    /// Members to whom runs are being sent: one sending at a time, so that what comes meanwhile is merged.
    sending: HashSet<MemberId>,
    asking: Arc<Semaphore>,
    /// Members whose sessions are over. That stays so.
    dead: Arc<std::sync::Mutex<HashSet<MemberId>>>,
    closings: u64,
    told: watch::Sender<Told>,
}

struct Entry {
    machine: Machine,
    closing: u64,
}

impl<'a> Actor<'a> {
    fn new(shared: &'a Arc<Shared>, session: &Session) -> Self {
        Self {
            shared,
            me: session.member,
            machines: HashMap::new(),
            followers: HashMap::new(),
            letters: HashMap::new(),
            questions: FuturesUnordered::new(),
            posts: FuturesUnordered::new(),
            sending: HashSet::new(),
            asking: Arc::new(Semaphore::new(AT_ONCE)),
            dead: Arc::default(),
            closings: 0,
            told: watch::Sender::new(Told::default()),
        }
    }

    async fn serve(mut self, session: Session, mut notices: Notices) -> (Ending, TaskTracker) {
        let shared = Arc::clone(self.shared);
        let (over, calls) = (CancellationToken::new(), TaskTracker::new());
        let live = LiveSession { member: self.me, stops: session.stops(), over: over.clone(), calls: calls.clone() };
        lock(&shared.live).session = Some(live);
        shared.membership.send_replace(Membership::Member(self.me));
        let (tick, mut ticks) = mpsc::channel(1);
        // Tasks of their own: neither must wait for the other, or for what this one does.
        let _keeper = Owned(tokio::spawn(keep(Arc::clone(&shared), session, tick, over.clone())));
        let share = Keeper::new(Arc::clone(&shared), self.me).map(|keeper| keeper.keep(self.told.subscribe()));
        let share = match share {
            Ok(keep) => Some(Owned(tokio::spawn(keep))),
            Err(error) => {
                tracing::error!(%error, "the limit cannot be shared");
                None
            }
        };
        {
            let mut local = lock(&shared.local);
            let needed: Vec<VmId> = local.needs.keys().copied().collect();
            local.dirty.extend(needed);
        }
        self.needs_changed();

        let ending = loop {
            self.post();
            tokio::select! {
                biased;
                () = over.cancelled() => break Ending::Lost,
                () = shared.leaving.cancelled() => break Ending::Left,
                Some(answer) = self.questions.next() => self.answer(answer),
                Some(sent) = self.posts.next() => if let Some(member) = sent {
                    self.sending.remove(&member);
                },
                Some(notice) = notices.own.next() => match notice {
                    Notice::Payload(payload) => self.letter(&payload),
                    Notice::Gap => self.look_again(),
                },
                Some(notice) = notices.all.next() => match notice {
                    Notice::Payload(payload) => self.call(&payload),
                    Notice::Gap => self.look_again(),
                },
                () = shared.changed.notified() => self.needs_changed(),
                Some(()) = ticks.recv() => self.tick(),
            }
        };
        let ours: Vec<VmId> = {
            let mut live = lock(&shared.live);
            if matches!(ending, Ending::Lost) {
                live.session = None;
            }
            live.followed.clear();
            match ending {
                Ending::Lost => live.owned.drain().map(|(vm, _)| vm).collect(),
                Ending::Left => live.owned.keys().copied().collect(),
            }
        };
        shared.gates.close_all();
        // Not before it has really ended: it would let operations begin.
        if let Some(share) = share {
            share.end().await;
        }
        let drained = shared.gates.resize(0);
        if matches!(ending, Ending::Left) {
            // What runs may end, as long as the session stands; it is renewed meanwhile.
            tokio::select! {
                () = drained => {}
                () = over.cancelled() => {}
            }
            let mut live = lock(&shared.live);
            live.session = None;
            live.owned.clear();
        } else {
            // Takes effect at once; nobody waits for it.
            drop(drained);
        }
        over.cancel();
        if let Some(listener) = shared.listener() {
            for vm in &ours {
                Arc::clone(&listener).followed(*vm, Vec::new());
                listener.machine_changed(*vm);
            }
        }
        lock(&shared.local).outbox.clear();
        (ending, calls)
    }

    /// Takes over what the process's handles say.
    fn needs_changed(&mut self) {
        struct Changed {
            vm: VmId,
            once: u32,
            pins: u32,
            turns: u32,
            fenced: Option<FencingToken>,
            watched: u32,
        }
        let changed: Vec<Changed> = {
            let mut local = lock(&self.shared.local);
            let dirty = std::mem::take(&mut local.dirty);
            let mut changed = Vec::with_capacity(dirty.len());
            for vm in dirty {
                let Some(needs) = local.needs.get_mut(&vm) else { continue };
                let watched = u32::try_from(needs.watched.len()).unwrap_or(u32::MAX);
                let (turns, fenced) = (std::mem::take(&mut needs.turns), needs.fenced.take());
                changed.push(Changed { vm, once: needs.once, pins: needs.pins, turns, fenced, watched });
                if needs.is_empty() {
                    local.needs.remove(&vm);
                }
            }
            changed
        };
        for Changed { vm, once, pins, turns, fenced, watched } in changed {
            let machine = &mut self.entry(vm).machine;
            let more_watched = watched > machine.watched;
            (machine.once, machine.pins, machine.watched) = (once, pins, watched);
            if turns > 0 {
                self.event(vm, Event::Turn);
            }
            self.event(vm, Event::Need);
            if let Some(token) = fenced {
                self.event(vm, Event::Fenced(token));
            }
            if more_watched {
                self.event(vm, Event::Watch);
            }
        }
        self.reports();
    }

    fn entry(&mut self, vm: VmId) -> &mut Entry {
        let me = self.me;
        self.machines.entry(vm).or_insert_with(|| Entry { machine: Machine::new(me), closing: 0 })
    }

    fn event(&mut self, vm: VmId, event: Event) {
        let machine = &mut self.entry(vm).machine;
        let effects = machine.on(event);
        let over = machine.is_over();
        for effect in effects {
            self.effect(vm, effect);
        }
        if over {
            self.machines.remove(&vm);
        }
    }

    /// Makes it known whose the machine is, for calls and for the executor.
    fn owned(&self, vm: VmId, token: Option<FencingToken>) {
        {
            let owned = &mut lock(&self.shared.live).owned;
            match token {
                Some(token) => owned.insert(vm, token),
                None => owned.remove(&vm),
            };
        }
        if let Some(listener) = self.shared.listener() {
            listener.machine_changed(vm);
        }
    }

    fn effect(&mut self, vm: VmId, effect: Effect) {
        match effect {
            Effect::Look => self.ask(vm, |asker| asker.look().boxed()),
            Effect::Take(over) => {
                let me = self.me;
                self.ask(vm, move |asker| {
                    async move {
                        let token = next_token(over.map(|(_, token)| token));
                        asker.write(over.map(|(version, _)| version), me, token).await
                    }
                    .boxed()
                });
            }
            Effect::Give { to, version, token } => {
                self.owned(vm, None);
                let token = next_token(Some(token));
                self.ask(vm, move |asker| asker.write_owned(version, to, token).boxed());
            }
            Effect::Release(version) => {
                self.owned(vm, None);
                self.ask(vm, move |asker| asker.release(version).boxed());
            }
            Effect::Open(token) => {
                self.owned(vm, Some(token));
                self.shared.gates.open(vm);
            }
            Effect::Close => {
                self.closings += 1;
                let closing = self.closings;
                self.entry(vm).closing = closing;
                let closed = self.shared.gates.close(vm);
                self.questions.push(
                    async move {
                        closed.await;
                        Answer { vm, event: Event::Closed, closing: Some(closing) }
                    }
                    .boxed(),
                );
            }
            Effect::Pause => {
                let pause = self.shared.times.pause();
                self.questions.push(
                    async move {
                        sleep(pause).await;
                        Answer { vm, event: Event::Paused, closing: None }
                    }
                    .boxed(),
                );
            }
            Effect::Hand { to, version, token } => {
                // When conditions last ran, so that the new owner does not run them again at once.
                let runs = self.runs_of(vm);
                let letter = self.letter_to(to);
                letter.watching.retain(|other| *other != vm);
                letter.yours.push(Yours { vm, version, token });
                letter.values.extend(runs.into_iter().map(|run| StoredValue { run, value: None, lateness_us: 0 }));
            }
            Effect::Ask(to) => self.letter_to(to).wants.push(vm),
            Effect::Follow(to) => {
                let runs = self.runs_watched(vm);
                self.letter_to(to).watches.extend(runs);
            }
            Effect::NotOurs(to) => self.letter_to(to).not_mine.push(vm),
            Effect::Moved => self.end_following(vm),
        }
    }

    /// Puts a question to the store.
    fn ask(&mut self, vm: VmId, question: impl FnOnce(Asker) -> BoxFuture<'static, Event>) {
        let asker = Asker {
            store: Arc::clone(&self.shared.store),
            times: self.shared.times,
            me: self.me,
            vm,
            dead: Arc::clone(&self.dead),
        };
        let (asking, question) = (Arc::clone(&self.asking), question(asker));
        self.questions.push(
            async move {
                let _permit = asking.acquire().await;
                Answer { vm, event: question.await, closing: None }
            }
            .boxed(),
        );
    }

    fn answer(&mut self, answer: Answer) {
        // Of a gate that was opened again and is being closed once more only the latest closing counts.
        if answer
            .closing
            .is_some_and(|closing| self.machines.get(&answer.vm).is_none_or(|entry| entry.closing != closing))
        {
            return;
        }
        self.event(answer.vm, answer.event);
    }

    fn letter(&mut self, payload: &[u8]) {
        let letter: Letter = match message::read(payload) {
            Ok(letter) => letter,
            Err(error) => {
                tracing::debug!(%error, "a notice could not be read");
                return;
            }
        };
        let by = letter.by;
        // First when what ran: what follows may begin runs.
        let now = Instant::now();
        for value in letter.values {
            self.ran(&value, now);
        }
        for Yours { vm, version, token } in letter.yours {
            self.event(vm, Event::Yours { version, token });
        }
        for vm in letter.not_mine {
            self.event(vm, Event::NotTheirs(by));
        }
        for vm in letter.wants {
            self.event(vm, Event::Wanted(by));
        }
        let mut by_vm: BTreeMap<VmId, Vec<Run>> = BTreeMap::new();
        for run in letter.watches {
            by_vm.entry(run.vm).or_default().push(run);
        }
        for (vm, runs) in by_vm {
            self.follow(vm, by, &runs, now);
        }
        for vm in letter.watching {
            self.event(vm, Event::Acknowledged(by));
        }
    }

    /// A run elsewhere of what is watched here.
    fn ran(&mut self, value: &StoredValue, now: Instant) {
        let Run { vm, id, age_us } = value.run;
        {
            let mut local = lock(&self.shared.local);
            let began = now.checked_sub(Duration::from_micros(age_us.unwrap_or(0))).unwrap_or(now);
            let latest = local.ran.entry(id).or_insert(began);
            *latest = began.max(*latest);
        }
        let lateness = Duration::from_micros(value.lateness_us);
        if let Some(listener) = self.shared.listener()
            && value.value.is_some()
        {
            listener.ran_elsewhere(RunReport { vm, condition: id, value: value.value, lateness });
        }
    }

    /// A member asks us to run what it watches.
    fn follow(&mut self, vm: VmId, by: MemberId, runs: &[Run], now: Instant) {
        if !self.machines.get(&vm).is_some_and(|entry| entry.machine.may_run()) {
            self.event(vm, Event::Followed(by));
            return;
        }
        {
            let mut local = lock(&self.shared.local);
            for run in runs {
                if let Some(age) = run.age_us
                    && let Some(began) = now.checked_sub(Duration::from_micros(age))
                {
                    let latest = local.ran.entry(run.id).or_insert(began);
                    *latest = began.max(*latest);
                }
            }
        }
        let followers = self.followers.entry(vm).or_default();
        for run in runs {
            followers.entry(run.id).or_default().insert(by, WATCH_TICKS);
        }
        self.letter_to(by).watching.push(vm);
        self.following_changed(vm);
    }

    /// Makes it known which conditions of a machine are run for others.
    fn following_changed(&mut self, vm: VmId) {
        let ids: Vec<InstallId> = self.followers.get(&vm).map(|all| all.keys().copied().collect()).unwrap_or_default();
        {
            let mut live = lock(&self.shared.live);
            for (id, members) in self.followers.get(&vm).into_iter().flatten() {
                live.followed.insert(*id, members.keys().copied().collect());
            }
        }
        let count = u32::try_from(ids.len()).unwrap_or(u32::MAX);
        if ids.is_empty() {
            self.followers.remove(&vm);
        }
        let machine = &mut self.entry(vm).machine;
        if machine.followed != count {
            machine.followed = count;
            self.event(vm, Event::Need);
        }
        if let Some(listener) = self.shared.listener() {
            listener.followed(vm, ids);
        }
    }

    /// The machine is not ours any more: who follows us shall look again.
    fn end_following(&mut self, vm: VmId) {
        let Some(followers) = self.followers.remove(&vm) else { return };
        let members: HashSet<MemberId> = followers.values().flat_map(|members| members.keys().copied()).collect();
        for member in members {
            self.letter_to(member).not_mine.push(vm);
        }
        self.forget_followed(followers.into_keys());
        if let Some(listener) = self.shared.listener() {
            listener.followed(vm, Vec::new());
        }
    }

    fn forget_followed(&self, ids: impl Iterator<Item = InstallId>) {
        let mut live = lock(&self.shared.live);
        for id in ids {
            live.followed.remove(&id);
        }
    }

    /// All conditions of a machine that are run for anybody, with the age of their last runs.
    fn runs_of(&self, vm: VmId) -> Vec<Run> {
        let followed = self.followers.get(&vm).into_iter().flat_map(|all| all.keys().copied());
        let local = lock(&self.shared.local);
        let watched = local.needs.get(&vm).into_iter().flat_map(|needs| needs.watched.keys().copied());
        let ids: HashSet<InstallId> = followed.chain(watched).collect();
        ids.into_iter().filter(|id| local.ran.contains_key(id)).map(|id| last_run(vm, id, &local.ran)).collect()
    }

    fn runs_watched(&self, vm: VmId) -> Vec<Run> {
        let local = lock(&self.shared.local);
        let Some(needs) = local.needs.get(&vm) else { return Vec::new() };
        needs.watched.keys().map(|id| last_run(vm, *id, &local.ran)).collect()
    }

    fn call(&mut self, payload: &[u8]) {
        let call: Call = match message::read(payload) {
            Ok(call) => call,
            Err(error) => {
                tracing::debug!(%error, "a notice could not be read");
                return;
            }
        };
        match call {
            Call::Left(member) if member != self.me => {
                lock(&self.dead).insert(member);
                self.gone(member);
                self.told.send_modify(|told| told.freed += 1);
            }
            Call::Short(member) if member != self.me => self.told.send_modify(|told| told.asked += 1),
            Call::Freed(member) if member != self.me => self.told.send_modify(|told| told.freed += 1),
            Call::Left(_) | Call::Short(_) | Call::Freed(_) => {}
            Call::Removed(id) => self.tell_gone(Gone::Install(id)),
            Call::Gone(vm) => self.tell_gone(Gone::Vm(vm)),
        }
    }

    fn tell_gone(&self, gone: Gone) {
        if let Some(listener) = self.shared.listener() {
            listener.look_again(gone);
        }
    }

    fn gone(&mut self, member: MemberId) {
        let theirs: Vec<VmId> =
            self.machines.iter().filter(|(_, e)| e.machine.owner() == Some(member)).map(|(vm, _)| *vm).collect();
        for vm in theirs {
            self.event(vm, Event::NotTheirs(member));
        }
    }

    /// Notices were lost: everything that waits for one looks at the store.
    fn look_again(&mut self) {
        let waiting: Vec<(VmId, MemberId)> =
            self.machines.iter().filter_map(|(vm, entry)| Some((*vm, entry.machine.owner()?))).collect();
        for (vm, owner) in waiting {
            self.event(vm, Event::NotTheirs(owner));
        }
        self.told.send_modify(|told| {
            told.asked += 1;
            told.freed += 1;
        });
        self.tell_gone(Gone::Any);
    }

    /// A renewal has passed.
    fn tick(&mut self) {
        let machines: Vec<VmId> = self.machines.keys().copied().collect();
        for vm in machines {
            self.event(vm, Event::Tick);
        }
        let mut changed = Vec::new();
        for (vm, conditions) in &mut self.followers {
            let before: usize = conditions.values().map(BTreeMap::len).sum();
            let ended: Vec<InstallId> = conditions.keys().copied().collect();
            for members in conditions.values_mut() {
                members.retain(|_, ticks| {
                    *ticks -= 1;
                    *ticks > 0
                });
            }
            conditions.retain(|_, members| !members.is_empty());
            if conditions.values().map(BTreeMap::len).sum::<usize>() != before {
                let ended: Vec<InstallId> = ended.into_iter().filter(|id| !conditions.contains_key(id)).collect();
                changed.push((*vm, ended));
            }
        }
        for (vm, ended) in changed {
            self.forget_followed(ended.into_iter());
            self.following_changed(vm);
        }
        {
            let followed: HashSet<InstallId> = self.followers.values().flat_map(|all| all.keys().copied()).collect();
            let local = &mut *lock(&self.shared.local);
            let watched: HashSet<InstallId> =
                local.needs.values().flat_map(|needs| needs.watched.keys().copied()).collect();
            local.ran.retain(|id, _| followed.contains(id) || watched.contains(id));
        }
        self.told.send_modify(|told| told.ticks += 1);
    }

    fn letter_to(&mut self, to: MemberId) -> &mut Letter {
        let me = self.me;
        self.letters.entry(to).or_insert_with(|| Letter::new(me))
    }

    /// Puts what conditions gave into letters, but for members that are being written to: the next letter has it.
    fn reports(&mut self) {
        let now = Instant::now();
        let ready: Vec<(MemberId, Vec<StoredValue>)> = {
            let mut local = lock(&self.shared.local);
            let members: Vec<MemberId> =
                local.outbox.keys().filter(|member| !self.sending.contains(member)).copied().collect();
            let mut ready = Vec::new();
            for member in members {
                let Some(runs) = local.outbox.remove(&member) else { continue };
                let values = runs.into_values().map(|(report, began)| StoredValue {
                    run: Run {
                        vm: report.vm,
                        id: report.condition,
                        age_us: Some(micros(now.saturating_duration_since(began))),
                    },
                    value: report.value,
                    lateness_us: micros(report.lateness),
                });
                ready.push((member, values.collect()));
            }
            ready
        };
        for (member, values) in ready {
            self.letter_to(member).values.extend(values);
        }
    }

    /// Sends the letters that were written.
    fn post(&mut self) {
        if !lock(&self.shared.local).outbox.is_empty() {
            self.reports();
        }
        for (to, letter) in std::mem::take(&mut self.letters) {
            let Ok(topic) = message::member_topic(to) else { continue };
            self.sending.insert(to);
            let shared = Arc::clone(self.shared);
            self.posts.push(
                async move {
                    for notice in letter.notices() {
                        shared.send(&topic, notice).await;
                    }
                    Some(to)
                }
                .boxed(),
            );
        }
    }
}

fn last_run(vm: VmId, id: InstallId, ran: &HashMap<InstallId, Instant>) -> Run {
    Run { vm, id, age_us: ran.get(&id).map(|began| micros(began.elapsed())) }
}

/// Asks the store about one machine.
struct Asker {
    store: Arc<dyn StateStore>,
    times: Times,
    me: MemberId,
    vm: VmId,
    dead: Arc<std::sync::Mutex<HashSet<MemberId>>>,
}

impl Asker {
    async fn look(self) -> Event {
        let vm = self.vm;
        let seen = match timeout(self.times.answer(), self.seen()).await {
            Ok(Ok(seen)) => seen,
            Ok(Err(error)) => {
                tracing::debug!(%vm, %error, "a machine's owner could not be looked up");
                Seen::Failed
            }
            Err(_) => Seen::Failed,
        };
        Event::Seen(seen)
    }

    async fn seen(self) -> Result<Seen> {
        let Some((record, version)) = self.store.get_json::<OwnerRecord>(&owner_key(self.vm)?).await? else {
            return Ok(Seen::Nobody(None));
        };
        if record.member == self.me {
            return Ok(Seen::Us(version, record.token));
        }
        let known_dead = lock(&self.dead).contains(&record.member);
        if !known_dead && session::is_living(&self.store, record.member).await? {
            return Ok(Seen::Other(record.member));
        }
        lock(&self.dead).insert(record.member);
        Ok(Seen::Nobody(Some((version, record.token))))
    }

    async fn write_owned(self, version: crate::Version, member: MemberId, token: FencingToken) -> Event {
        self.write(Some(version), member, token).await
    }

    async fn write(self, over: Option<crate::Version>, member: MemberId, token: FencingToken) -> Event {
        let only = over.map_or(Precondition::Absent, Precondition::Version);
        let put = async { self.store.put_json(&owner_key(self.vm)?, &OwnerRecord { member, token }, only).await };
        Event::Wrote(match timeout(self.times.answer(), put).await {
            Ok(Ok(version)) => Wrote::Done(version, token),
            Ok(Err(error))
                if error.kind() == ErrorKind::AlreadyExists || error.reason() == Some(reason::VERSION_MISMATCH) =>
            {
                Wrote::Mismatch
            }
            Ok(Err(error)) => {
                tracing::debug!(vm = %self.vm, %error, "a machine's owner could not be written");
                Wrote::Unknown
            }
            Err(_) => Wrote::Unknown,
        })
    }

    async fn release(self, version: crate::Version) -> Event {
        let delete = async { self.store.delete(&owner_key(self.vm)?, Precondition::Version(version)).await };
        // Whatever came of it: the machine is not ours any more, and who wants it looks.
        let _ = timeout(self.times.answer(), delete).await;
        Event::Wrote(Wrote::Unknown)
    }
}

const OWNERS: &str = "owner/";

fn owner_key(vm: VmId) -> Result<Key> {
    Key::new(format!("{OWNERS}{vm}"))
}

/// A token over the one before, and over all that a store may have forgotten.
fn next_token(before: Option<FencingToken>) -> FencingToken {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    FencingToken(before.map_or(0, |token| token.0 + 1).max(micros(now)))
}

/// Deletes what dead owners left.
pub(super) async fn sweep(shared: &Arc<Shared>) -> Result<usize> {
    let old = next_token(None).0.saturating_sub(micros(SWEEP_AGE));
    let (mut after, mut swept): (Option<Key>, usize) = (None, 0);
    let mut living: HashMap<MemberId, bool> = HashMap::new();
    loop {
        let page = shared.store.list(OWNERS, after.as_ref(), MAX_PAGE).await?;
        for (key, there) in &page {
            let Ok(record) = serde_json::from_slice::<OwnerRecord>(&there.value) else {
                tracing::warn!(%key, "a machine's owner has a form that this version does not read");
                continue;
            };
            // A token near to now, or ahead of it, is still of use to whoever comes next.
            if record.token.0 >= old {
                continue;
            }
            let lives = match living.get(&record.member) {
                Some(lives) => *lives,
                None => {
                    let lives = session::is_living(&shared.store, record.member).await?;
                    living.insert(record.member, lives);
                    lives
                }
            };
            if !lives {
                match shared.store.delete(key, Precondition::Version(there.version)).await {
                    Ok(_) => swept += 1,
                    // Somebody has taken the machine just now.
                    Err(error) if error.reason() == Some(reason::VERSION_MISMATCH) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        if page.len() < MAX_PAGE {
            return Ok(swept);
        }
        after = page.last().map(|(key, _)| key.clone());
    }
}

/// A task that ends with its owner.
struct Owned(tokio::task::JoinHandle<()>);

impl Owned {
    async fn end(mut self) {
        self.0.abort();
        // It was aborted: how it ended says nothing.
        let _ = (&mut self.0).await;
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        self.0.abort();
    }
}
