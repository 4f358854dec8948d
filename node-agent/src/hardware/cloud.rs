//! Asks the cloud that a machine runs in for its VM size. Only where the agent was told to: the address belongs to somebody
//! else outside a cloud.

use std::time::{Duration, Instant};

use ureq::Agent;

/// For all questions together.
const PATIENCE: Duration = Duration::from_secs(1);
const SIZE_BYTES_MAX: u64 = 256;

/// Why no cloud said it.
#[derive(Debug, thiserror::Error)]
#[error("{url}: {why}")]
pub struct CloudError {
    url: String,
    why: String,
}

/// A cloud: a path and the header that it wants to see.
const AZURE: (&str, (&str, &str)) = (
    "/metadata/instance/compute/vmSize?api-version=2021-02-01&format=text",
    ("Metadata", "true"),
);
const GOOGLE: (&str, (&str, &str)) = (
    "/computeMetadata/v1/instance/machine-type",
    ("Metadata-Flavor", "Google"),
);
const AWS: &str = "/latest/meta-data/instance-type";
const AWS_TOKEN: &str = "/latest/api/token";

/// The VM size in the words of the cloud.
pub fn vm_size(base: &str) -> Result<String, CloudError> {
    let base = base.trim_end_matches('/');
    let until = Instant::now() + PATIENCE;
    let mut why = String::new();
    for ask in [azure, google, aws] {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        let agent: Agent = Agent::config_builder()
            .timeout_global(Some(left))
            .max_redirects(0)
            .proxy(None)
            .build()
            .into();
        match ask(&agent, base) {
            // Google says projects/{number}/machineTypes/{size}.
            Ok(text) => match text.trim().rsplit('/').next() {
                Some(size) if is_size(size) => return Ok(size.to_owned()),
                _ => why = "the answer is no VM size".to_owned(),
            },
            Err(error) => why = error.to_string(),
        }
    }
    Err(CloudError {
        url: base.to_owned(),
        why,
    })
}

fn is_size(text: &str) -> bool {
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !text.is_empty() && text.len() <= 64 && text.chars().all(legal)
}

fn get(agent: &Agent, url: String, (name, value): (&str, &str)) -> Result<String, ureq::Error> {
    let mut answer = agent.get(url).header(name, value).call()?;
    answer
        .body_mut()
        .with_config()
        .limit(SIZE_BYTES_MAX)
        .read_to_string()
}

fn azure(agent: &Agent, base: &str) -> Result<String, ureq::Error> {
    get(agent, format!("{base}{}", AZURE.0), AZURE.1)
}

fn google(agent: &Agent, base: &str) -> Result<String, ureq::Error> {
    get(agent, format!("{base}{}", GOOGLE.0), GOOGLE.1)
}

/// It wants a token first.
fn aws(agent: &Agent, base: &str) -> Result<String, ureq::Error> {
    let token = agent
        .put(format!("{base}{AWS_TOKEN}"))
        .header("X-aws-ec2-metadata-token-ttl-seconds", "60")
        .send_empty()?
        .body_mut()
        .with_config()
        .limit(SIZE_BYTES_MAX)
        .read_to_string()?;
    let header = ("X-aws-ec2-metadata-token", token.trim());
    get(agent, format!("{base}{AWS}"), header)
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader, Write as _};
    use std::net::{TcpListener, TcpStream};

    use super::*;

    /// A twin of a cloud on loopback: answers requests whose first line and headers have these words, and 404 to others.
    fn twin(answers: &'static [(&'static str, &'static str, &'static str)]) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                answer(stream.unwrap(), answers);
            }
        });
        url
    }

    fn answer(mut stream: TcpStream, answers: &[(&str, &str, &str)]) {
        let lines = BufReader::new(stream.try_clone().unwrap()).lines();
        let lines: Vec<_> = lines
            .map_while(Result::ok)
            .take_while(|l| !l.is_empty())
            .collect();
        let text = lines.join("\n").to_lowercase();
        let has = |word: &str| text.contains(&word.to_lowercase());
        let found = answers
            .iter()
            .find(|(path, header, _)| has(path) && has(header));
        let (status, body) = match found {
            Some((_, _, body)) => ("200 OK", *body),
            None => ("404 Not Found", ""),
        };
        let length = body.len();
        let text = format!(
            "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
        );
        let _ = stream.write_all(text.as_bytes());
    }

    #[test]
    fn every_cloud_is_asked_in_its_own_way() {
        let azure = twin(&[(
            "GET /metadata/instance/compute/vmSize",
            "metadata: true",
            "Standard_NC6",
        )]);
        assert_eq!(vm_size(&azure).unwrap(), "Standard_NC6");
        let google = twin(&[(
            "GET /computeMetadata/v1/instance/machine-type",
            "metadata-flavor: google",
            "projects/1/machineTypes/n1-standard-4",
        )]);
        assert_eq!(vm_size(&google).unwrap(), "n1-standard-4");
        let aws = twin(&[
            ("PUT /latest/api/token", "ttl-seconds: 60", "the-token"),
            (
                "GET /latest/meta-data/instance-type",
                "token: the-token",
                "p3.2xlarge",
            ),
        ]);
        assert_eq!(vm_size(&aws).unwrap(), "p3.2xlarge");
        let nonsense = twin(&[("GET /metadata", "", "<html>not a size</html>")]);
        assert!(vm_size(&nonsense).is_err());
    }

    #[test]
    fn nobody_is_waited_for_longer_than_a_second() {
        // It takes connections and says nothing.
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        let began = Instant::now();
        let url = format!("http://{}", silent.local_addr().unwrap());
        assert!(vm_size(&url).is_err());
        assert!(began.elapsed() < 2 * PATIENCE, "{:?}", began.elapsed());
        drop(silent);
        assert!(vm_size(&url).is_err(), "nobody listens");
    }
}
