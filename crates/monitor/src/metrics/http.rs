//! What is asked for, and the answer. Nothing here touches a socket.

/// A request's head may be this long.
pub(super) const MAX_HEAD_BYTES: usize = 8192;
/// As many header lines a request may have.
const MAX_HEADERS: usize = 64;

/// What to answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    /// The figures.
    Metrics,
    /// The figures' headers alone.
    MetricsHead,
    /// There is nothing else than `/metrics`.
    NotFound,
    /// Figures are read and nothing else.
    MethodNotAllowed,
    /// It is not HTTP.
    BadRequest,
    /// The request did not come in time.
    TimedOut,
    /// Its head is too long.
    TooLarge,
}

/// What to answer to the bytes that have come so far; nothing while more must come.
pub(super) fn look(head: &[u8]) -> Option<Answer> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(head) {
        Ok(httparse::Status::Partial) if head.len() >= MAX_HEAD_BYTES => Some(Answer::TooLarge),
        Ok(httparse::Status::Partial) => None,
        Ok(httparse::Status::Complete(_)) => {
            Some(answer(request.method.unwrap_or_default(), request.path.unwrap_or_default()))
        }
        Err(httparse::Error::TooManyHeaders) => Some(Answer::TooLarge),
        Err(_) => Some(Answer::BadRequest),
    }
}

fn answer(method: &str, target: &str) -> Answer {
    // A query says nothing here. Proxies ask with the whole address.
    let target =
        target.strip_prefix("http://").and_then(|rest| rest.find('/').and_then(|at| rest.get(at..))).unwrap_or(target);
    let path = target.split('?').next().unwrap_or_default();
    match (method, path) {
        ("GET", "/metrics") => Answer::Metrics,
        ("HEAD", "/metrics") => Answer::MetricsHead,
        (_, "/metrics") => Answer::MethodNotAllowed,
        _ => Answer::NotFound,
    }
}

impl Answer {
    /// The bytes to send. `metrics` is asked only when it is needed.
    pub(super) fn bytes(self, metrics: impl FnOnce() -> String) -> Vec<u8> {
        let plain = "text/plain; charset=utf-8";
        let (status, kind, body) = match self {
            Self::Metrics | Self::MetricsHead => ("200 OK", "text/plain; version=0.0.4; charset=utf-8", metrics()),
            Self::NotFound => ("404 Not Found", plain, "there is nothing but /metrics here\n".to_owned()),
            Self::MethodNotAllowed => ("405 Method Not Allowed", plain, "/metrics can be read, with GET\n".to_owned()),
            Self::BadRequest => ("400 Bad Request", plain, "this is not HTTP\n".to_owned()),
            Self::TimedOut => ("408 Request Timeout", plain, "the request took too long\n".to_owned()),
            Self::TooLarge => (
                "431 Request Header Fields Too Large",
                plain,
                format!("a request may have {MAX_HEADERS} header lines and {MAX_HEAD_BYTES} bytes\n"),
            ),
        };
        let allow = if self == Self::MethodNotAllowed { "Allow: GET, HEAD\r\n" } else { "" };
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n{allow}Cache-Control: no-store\r\nConnection: close\r\n\r\n",
            body.len()
        );
        let body = if self == Self::MetricsHead { String::new() } else { body };
        [head.into_bytes(), body.into_bytes()].concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests() {
        for (request, wanted) in [
            ("GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n", Some(Answer::Metrics)),
            ("GET /metrics?name[]=x HTTP/1.0\r\n\r\n", Some(Answer::Metrics)),
            ("GET http://a:1/metrics HTTP/1.1\r\n\r\n", Some(Answer::Metrics)),
            ("HEAD /metrics HTTP/1.1\r\n\r\n", Some(Answer::MetricsHead)),
            ("POST /metrics HTTP/1.1\r\nContent-Length: 1\r\n\r\nx", Some(Answer::MethodNotAllowed)),
            ("GET / HTTP/1.1\r\n\r\n", Some(Answer::NotFound)),
            ("GET /metrics/../metrics HTTP/1.1\r\n\r\n", Some(Answer::NotFound)),
            ("GET http:// HTTP/1.1\r\n\r\n", Some(Answer::NotFound)),
            ("GET /metrics HTTP/1.1\r\nHost: a", None),
            ("", None),
            ("{\"execute\": \"qmp_capabilities\"}\n", Some(Answer::BadRequest)),
            ("\u{16}\u{3}\u{1}", Some(Answer::BadRequest)),
            ("GET /metrics HTTP/9\r\n\r\n", Some(Answer::BadRequest)),
        ] {
            assert_eq!(look(request.as_bytes()), wanted, "{request:?}");
        }
        let long = format!("GET /metrics HTTP/1.1\r\nA: {}", "a".repeat(MAX_HEAD_BYTES));
        assert_eq!(look(long.as_bytes()), Some(Answer::TooLarge));
        let many = format!("GET /metrics HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(MAX_HEADERS + 1));
        assert_eq!(look(many.as_bytes()), Some(Answer::TooLarge));
    }

    #[test]
    fn answers() {
        let text = |answer: Answer| String::from_utf8(answer.bytes(|| "a 1\n".to_owned())).unwrap();
        let metrics = text(Answer::Metrics);
        assert!(metrics.starts_with("HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4"), "{metrics}");
        assert!(metrics.ends_with("Content-Length: 4\r\nCache-Control: no-store\r\nConnection: close\r\n\r\na 1\n"));
        assert!(text(Answer::MetricsHead).ends_with("\r\n\r\n"));
        assert!(text(Answer::MethodNotAllowed).contains("\r\nAllow: GET, HEAD\r\n"));
    }
}
