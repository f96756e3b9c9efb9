//! The life of one connection: requests in, answers out, one after the other.
//!
//! While a request is answered, whether by waiting, hanging or streaming, the
//! connection is read as well: a client that closes it, in one direction or
//! both, has left, and the answer ends at once.
//!
//! **Invariant:** a record's state leaves [`State::Open`] exactly once, also
//! when the task is aborted.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU16, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{io::AsyncWriteExt as _, net::TcpStream, time::timeout};

use super::{
    api::{self, Content, Reply},
    faults::{EarlyThen, Fault},
    http::{Body, Head, Inbox, ReadError},
    ollama,
    record::{Arrival, State},
    server::Shared,
    wire::{self, Manner, Out, Pace, Stop, Then},
};

/// How long a closed connection is read on, so that the client's unread bytes
/// do not turn the FIN into a reset.
const LINGER: Duration = Duration::from_secs(1);

/// How a connection is to end.
enum End {
    /// Orderly.
    Fin,
    /// At once, by a reset.
    Reset,
    /// The client has ended it.
    Gone,
}

/// Serves a connection to its end. `number` — from 1.
pub(crate) async fn serve(shared: Arc<Shared>, mut stream: TcpStream, number: u64) {
    let mut inbox = Inbox::default();
    match requests(&shared, &stream, &mut inbox, number).await {
        End::Gone => {}
        End::Fin => {
            if stream.shutdown().await.is_ok() {
                let drained = timeout(LINGER, inbox.drain(&stream)).await;
                drop(drained); // either way it is closed now
            }
        }
        End::Reset => {
            if let Err(error) = stream.set_zero_linger() {
                log::debug!("cannot reset: connection={number} error={error}");
            }
        }
    }
}

async fn requests(shared: &Shared, stream: &TcpStream, inbox: &mut Inbox, connection: u64) -> End {
    let mut reset_on_next = false;
    for nth in 1.. {
        if inbox.wait(stream).await.is_err() {
            return End::Gone;
        }
        if reset_on_next {
            return End::Reset;
        }
        let head = match inbox.head(stream).await {
            Ok(head) => head,
            Err(ReadError::Gone) => return End::Gone,
            Err(ReadError::Bad(status, why)) => {
                let exchange = Exchange::refused(shared, stream, connection, nth, inbox);
                return exchange.refuse(status, why, &Body::default(), inbox).await;
            }
        };
        let exchange = Exchange::new(shared, stream, connection, nth, head);
        match exchange.run(inbox).await {
            Ok(Then::Keep) => {}
            Ok(Then::ResetOnNext) => reset_on_next = true,
            Ok(Then::Close) | Err(Stop::Fin) => return End::Fin,
            Err(Stop::Reset) => return End::Reset,
            Err(Stop::Gone) => return End::Gone,
        }
    }
    End::Fin
}

/// One request and its answer.
struct Exchange<'a> {
    shared: &'a Shared,
    stream: &'a TcpStream,
    connection: u64,
    nth: u64,
    head: Head,
    fault: Arc<Fault>,
    /// Why the request's own `x-sim` is not understood.
    bad_fault: Option<String>,
    sent: AtomicU64,
    /// 0 until the head of the answer is under way.
    status: AtomicU16,
}

impl<'a> Exchange<'a> {
    fn new(
        shared: &'a Shared,
        stream: &'a TcpStream,
        connection: u64,
        nth: u64,
        head: Head,
    ) -> Self {
        let mut bad_fault = None;
        let fault = match &head.fault {
            None => shared.faults.take(head.path(), api::is_model_call(&head)),
            Some(text) => match text.parse::<Fault>() {
                Ok(fault) if fault.fits_one_request() => Arc::new(fault),
                Ok(_) => {
                    let why = "connect, times and path: over the control port only";
                    bad_fault = Some(why.to_owned());
                    shared.faults.none()
                }
                Err(error) => {
                    bad_fault = Some(error.to_string());
                    shared.faults.none()
                }
            },
        };
        Self {
            shared,
            stream,
            connection,
            nth,
            head,
            fault,
            bad_fault,
            sent: AtomicU64::new(0),
            status: AtomicU16::new(0),
        }
    }

    /// What could not be read as a request; its head goes into the records.
    fn refused(
        shared: &'a Shared,
        stream: &'a TcpStream,
        connection: u64,
        nth: u64,
        inbox: &Inbox,
    ) -> Self {
        let head = Head::unread(inbox.last_head.clone());
        Self {
            shared,
            stream,
            connection,
            nth,
            head,
            fault: shared.faults.none(),
            bad_fault: None,
            sent: AtomicU64::new(0),
            status: AtomicU16::new(0),
        }
    }

    fn note(&self, body: &Body, body_complete: bool) -> Ending<'_> {
        let fault = (!self.fault.is_none()).then(|| self.fault.to_string());
        let id = self.shared.log.push(Arrival {
            connection: self.connection,
            nth: self.nth,
            head: &self.head.bytes,
            body,
            body_complete,
            fault,
        });
        Ending {
            shared: self.shared,
            id,
            since: Instant::now(),
            state: State::Cut,
            sent: &self.sent,
            status: &self.status,
        }
    }

    /// Answers what is no request, and ends the connection.
    async fn refuse(&self, status: u16, why: &str, came: &Body, inbox: &mut Inbox) -> End {
        let mut ending = self.note(came, false);
        let reply = Reply::unreadable(status, why);
        let answer = self.send(reply, self.manner(false));
        match self.watched(answer, inbox).await {
            Err(Stop::Gone) => {
                ending.state = State::ClientLeft;
                End::Gone
            }
            _ => {
                ending.state = State::Finished;
                End::Fin
            }
        }
    }

    async fn run(&self, inbox: &mut Inbox) -> Result<Then, Stop> {
        if let Some(status) = self.fault.early {
            return self.early(status, inbox).await;
        }
        if self.head.expects_continue {
            let mut out = Out::new(self.stream, &self.sent);
            out.put(b"HTTP/1.1 100 Continue\r\n\r\n");
            out.flush().await?;
        }
        let mut partial = Body::default();
        let body = match inbox
            .body(self.stream, self.head.framing, &mut partial)
            .await
        {
            Ok(body) => body,
            Err(ReadError::Gone) => {
                self.note(&partial, false).state = State::ClientLeft;
                return Err(Stop::Gone);
            }
            Err(ReadError::Bad(status, why)) => {
                return match self.refuse(status, why, &partial, inbox).await {
                    End::Gone => Err(Stop::Gone),
                    _ => Ok(Then::Close),
                };
            }
        };
        let mut ending = self.note(&body, true);
        let result = self.watched(self.answer(&body, ending.id), inbox).await;
        ending.state = state_of(&result);
        result
    }

    /// Answers before the body is read.
    async fn early(&self, status: u16, inbox: &mut Inbox) -> Result<Then, Stop> {
        let mut ending = self.note(&Body::default(), false);
        let closes = self.fault.early_then != Some(EarlyThen::Read);
        let reply = Reply::ordered(status, &self.fault, self.is_native());
        let result = self
            .send(reply, self.manner(!closes && self.head.keep_alive))
            .await;
        if closes || result.is_err() {
            ending.state = state_of(&result);
            return result;
        }
        let mut partial = Body::default();
        let body = inbox
            .body(self.stream, self.head.framing, &mut partial)
            .await;
        let result = match body {
            Ok(body) => {
                self.shared.log.set_body(ending.id, &body, true);
                result
            }
            Err(_) => {
                self.shared.log.set_body(ending.id, &partial, false);
                Err(Stop::Gone)
            }
        };
        // The answer itself was finished, whatever became of the body.
        ending.state = State::Finished;
        result
    }

    /// Runs an answer as long as the client is there.
    async fn watched(
        &self,
        answer: impl Future<Output = Result<Then, Stop>>,
        inbox: &mut Inbox,
    ) -> Result<Then, Stop> {
        tokio::select! {
            biased; // an answer that needs no waiting costs no look at the client
            result = answer => result,
            () = inbox.client_left(self.stream) => Err(Stop::Gone),
        }
    }

    async fn answer(&self, body: &Body, id: u64) -> Result<Then, Stop> {
        let fault = &*self.fault;
        if fault.hang {
            return std::future::pending().await;
        }
        if fault.reset {
            return Err(Stop::Reset);
        }
        let manner = self.manner(self.head.keep_alive);
        if let Some(why) = &self.bad_fault {
            return self.send(Reply::bad_fault(why), manner).await;
        }
        if let Some(status) = fault.status.filter(|status| *status >= 300) {
            return self
                .send(Reply::ordered(status, fault, self.is_native()), manner)
                .await;
        }
        if fault.echo_headers {
            return self.send(Reply::echo(&self.head), manner).await;
        }
        let model_call = api::is_model_call(&self.head);
        // Ollama loads behind the request, which waits.
        if model_call && self.is_native() {
            self.shared.loaded().await;
        }
        if self.shared.is_loading() && self.head.path().ends_with("/api/ps") {
            return self
                .send(ollama::ps(&self.shared.options, true), manner)
                .await;
        }
        if self.shared.is_loading() && (model_call || self.head.path().ends_with("/health")) {
            return self.send(Reply::loading(), manner).await;
        }
        // Held until the answer is sent: a slot is a place in the model's batch.
        let slot = match model_call {
            true => self.shared.slot().await,
            false => Ok(None),
        };
        let Ok(_slot) = slot else {
            return self.send(Reply::busy(self.is_native()), manner).await;
        };
        let number = self.shared.next_answer();
        let mut reply = api::reply(
            &self.shared.options,
            &self.head,
            &body.content,
            fault,
            number,
        );
        if let Some(status) = fault.status {
            reply.status = status;
        }
        if !matches!(reply.content, Content::Whole(_)) {
            // It takes a while: who looks meanwhile sees the status.
            let status = reply.status;
            self.shared
                .log
                .update(id, |record| record.status = Some(status));
        }
        self.send(reply, manner).await
    }

    /// Whether it was asked in Ollama's own API.
    fn is_native(&self) -> bool {
        ollama::is_native(self.head.path())
    }

    async fn send(&self, reply: Reply, manner: Manner<'_>) -> Result<Then, Stop> {
        self.status.store(reply.status, Ordering::Relaxed);
        let mut out = Out::new(self.stream, &self.sent);
        wire::send(&mut out, reply, manner).await
    }

    fn manner(&self, keep_alive: bool) -> Manner<'_> {
        let options = &self.shared.options;
        let fault = &*self.fault;
        Manner {
            fault,
            pace: Pace {
                first_token: fault.first_token.unwrap_or(options.first_token),
                per_token: fault.gap.or(options.per_token()),
            },
            keep_alive,
            head_only: self.head.method() == "HEAD",
        }
    }
}

fn state_of(result: &Result<Then, Stop>) -> State {
    match result {
        Ok(_) => State::Finished,
        Err(Stop::Gone) => State::ClientLeft,
        Err(Stop::Fin | Stop::Reset) => State::Cut,
    }
}

/// Closes a record when it is dropped, whatever ended the exchange.
struct Ending<'a> {
    shared: &'a Shared,
    id: u64,
    since: Instant,
    /// What it is closed with; [`State::Cut`] unless told otherwise.
    state: State,
    sent: &'a AtomicU64,
    status: &'a AtomicU16,
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        let status = self.status.load(Ordering::Relaxed);
        self.shared.log.update(self.id, |record| {
            record.state = self.state;
            record.status = (status != 0).then_some(status);
            record.sent = self.sent.load(Ordering::Relaxed);
            record.ended_after = Some(self.since.elapsed());
        });
    }
}
