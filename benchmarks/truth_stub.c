/* A server that knows when it sent: every POST gets a stream of TOKENS chunks, the first TTFT_US after the request, then one every GAP_US.
 *
 * usage: truth_stub TOKENS TTFT_US GAP_US
 *
 * Prints its port, serves until its standard input ends, then prints what it did as one line of JSON: calls, chunks, seconds between the
 * first request and the last chunk, and p50 and p99 of its own times to the first chunk and gaps between chunks, each stamped just before
 * the bytes go to the kernel. One thread; where both pauses are 0, it sends as fast as it can, one chunk a call in turn.
 *
 * All streams have the same two pauses, so what is due next stands at the head of one of two queues: first chunks in the order of the
 * requests, later ones in the order in which their predecessors were due. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { STREAMS = 1 << 16, BINS = 20000000, REQUEST = 1 << 16 };

typedef struct {
    int fd, sent, streaming;        /* sent: chunks of the reply under way */
    size_t part;                    /* bytes of the next chunk that the kernel took already */
    long due, asked, before;        /* ns: when the next chunk is due, the request came, the last chunk went */
    size_t have;
    char in[REQUEST];
} Stream;

typedef struct {
    Stream **slot;
    unsigned head, tail;
} Queue;

typedef struct {                    /* counts by microsecond */
    unsigned *bin;
    long n;
} Times;

static Stream *streams[STREAMS];
static Queue firsts, nexts;
static Times ttft, gap;
static int epoll, tokens;
static long ttft_ns, gap_ns, calls, chunks, first_asked, last_sent;
static char plain[512], last[1024], opening[1024];

static long now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000L + t.tv_nsec;
}

static void push(Queue *q, Stream *s) { q->slot[q->tail++ % STREAMS] = s; }
static Stream *head(Queue *q) { return q->head == q->tail ? NULL : q->slot[q->head % STREAMS]; }

static void add(Times *t, long ns) {
    long us = (ns + 500) / 1000;
    t->bin[us < BINS ? us : BINS - 1]++;
    t->n++;
}

static double quantile_ms(const Times *t, double q) {
    long seen = 0;
    for (int us = 0; us < BINS; us++)
        if ((seen += t->bin[us]) > q * (t->n - 1)) return us / 1e3;
    return 0;
}

/* `data` as one chunk of HTTP/1.1's chunked coding, behind what `to` holds. */
static void frame(char *to, const char *data) { sprintf(to + strlen(to), "%zx\r\n%s\r\n", strlen(data), data); }

static void make_texts(void) {
    static char event[512];
    const char *form = "data: {\"id\":\"chatcmpl-9e3779b97f4a7c15\",\"object\":\"chat.completion.chunk\",\"created\":1764000000,"
                       "\"model\":\"truth\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\" token\"},\"logprobs\":null,"
                       "\"finish_reason\":%s,\"token_ids\":null}]}\n\n";
    sprintf(event, form, "null");
    frame(plain, event);
    strcpy(opening, "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n");
    sprintf(event, form, "\"length\"");
    frame(last, event);
    sprintf(event, "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":1,\"total_tokens\":%d,\"completion_tokens\":%d}}\n\n", tokens + 1, tokens);
    frame(last, event);
    frame(last, "data: [DONE]\n\n");
    strcat(last, "0\r\n\r\n");
}

static void watch(Stream *s, int how, unsigned events) {
    struct epoll_event e = {.events = events, .data.ptr = s};
    epoll_ctl(epoll, how, s->fd, &e);
}

static void end(Stream *s) {        /* the client went away; what stands in a queue is passed over there */
    close(s->fd);
    s->fd = -1;
}

/* Sends the chunk that is due; 0 where the kernel takes no more of it now. */
static int send_chunk(Stream *s) {
    static char whole[sizeof opening + sizeof plain + sizeof last];
    const char *text = s->sent == tokens - 1 ? last : plain;
    if (s->sent == 0) text = strcat(strcpy(whole, opening), text);
    size_t size = strlen(text);
    long at = now();
    ssize_t n = send(s->fd, text + s->part, size - s->part, MSG_NOSIGNAL);
    if (n < 0 && errno != EAGAIN) return end(s), 1;
    if (s->part == 0 && n > 0) {
        add(s->sent ? &gap : &ttft, at - (s->sent ? s->before : s->asked));
        s->before = last_sent = at;
        chunks++;
    }
    s->part += n > 0 ? n : 0;
    if (s->part < size) return 0;
    s->part = 0;
    s->sent++;
    return 1;
}

static void step(Stream *s) {
    if (s->fd < 0) return;
    if (!send_chunk(s)) {
        watch(s, EPOLL_CTL_MOD, EPOLLIN | EPOLLOUT);
    } else if (s->sent < tokens) {
        s->due += gap_ns;
        push(&nexts, s);
    } else {
        s->streaming = 0;
        calls++;
    }
}

static void answer(Stream *s, size_t size) {
    const char *model = "{\"data\":[{\"id\":\"truth\"}]}", *none = "{}";
    char text[512];
    if (!strncmp(s->in, "POST /v1/chat", 13)) {
        s->asked = now();
        if (!first_asked) first_asked = s->asked;
        s->due = s->asked + ttft_ns;
        s->sent = 0;
        s->streaming = 1;
        push(&firsts, s);
    } else {
        int known = !strncmp(s->in, "GET /v1/models", 14);
        const char *body = known ? model : none;
        sprintf(text, "HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s",
                known ? "200 OK" : "404 Not Found", strlen(body), body);
        if (send(s->fd, text, strlen(text), MSG_NOSIGNAL) < 0) end(s);
    }
    s->have -= size;
    memmove(s->in, s->in + size, s->have);
}

static void read_from(Stream *s) {
    ssize_t n = recv(s->fd, s->in + s->have, REQUEST - 1 - s->have, 0);
    if (n == 0 || (n < 0 && errno != EAGAIN)) return end(s);
    s->have += n > 0 ? n : 0;
    s->in[s->have] = 0;
    char *body = strstr(s->in, "\r\n\r\n"), *length = strcasestr(s->in, "content-length:");
    if (!body || s->streaming) return;
    size_t size = body + 4 - s->in + (length && length < body ? strtoul(length + 15, NULL, 10) : 0);
    if (s->have >= size) answer(s, size);
}

static void take(int listener) {
    int fd, one = 1;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
        if (fd >= STREAMS) exit(2);
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        Stream *s = streams[fd] = calloc(1, sizeof *s); /* a stream that ended may still stand in a queue: it is not used again */
        s->fd = fd;
        watch(s, EPOLL_CTL_ADD, EPOLLIN);
    }
}

/* Sends all that is due; gives how long until the next, in ns. */
static long serve_due(void) {
    for (int i = 0; i < 256; i++) {
        Stream *a = head(&firsts), *b = head(&nexts);
        if (!a && !b) return 1000000000L;
        Queue *q = !b || (a && a->due <= b->due) ? &firsts : &nexts;
        Stream *s = q == &firsts ? a : b;
        long left = s->due - now();
        if (left > 0) return left;
        q->head++;
        step(s);
    }
    return 0; /* so many at a time, lest requests wait */
}

int main(int argc, char **argv) {
    if (argc != 4) return 2;
    tokens = atoi(argv[1]), ttft_ns = atol(argv[2]) * 1000, gap_ns = atol(argv[3]) * 1000;
    firsts.slot = calloc(STREAMS, sizeof(Stream *)), nexts.slot = calloc(STREAMS, sizeof(Stream *));
    ttft.bin = calloc(BINS, sizeof(unsigned)), gap.bin = calloc(BINS, sizeof(unsigned));
    make_texts();
    prctl(PR_SET_TIMERSLACK, 1);
    struct sockaddr_in where = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof where;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (bind(listener, (struct sockaddr *)&where, size) || listen(listener, 4096)) return 2;
    getsockname(listener, (struct sockaddr *)&where, &size);
    printf("%d\n", ntohs(where.sin_port));
    fflush(stdout);
    epoll = epoll_create1(0);
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = &listener}, got[1024];
    epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &e);
    e.data.ptr = NULL;
    epoll_ctl(epoll, EPOLL_CTL_ADD, 0, &e);
    for (;;) {
        long left = serve_due();
        struct timespec wait = {left / 1000000000L, left % 1000000000L};
        int n = epoll_pwait2(epoll, got, 1024, &wait, NULL);
        for (int i = 0; i < n; i++) {
            Stream *s = got[i].data.ptr;
            if (!s) goto done;
            if (s == (void *)&listener) take(listener);
            else if (s->fd >= 0 && got[i].events & EPOLLOUT) watch(s, EPOLL_CTL_MOD, EPOLLIN), step(s);
            else if (s->fd >= 0) read_from(s);
        }
    }
done:
    printf("{\"calls\":%ld,\"chunks\":%ld,\"seconds\":%.6f,\"ttft_ms\":{\"p50\":%.3f,\"p99\":%.3f},\"gap_ms\":{\"p50\":%.3f,\"p99\":%.3f}}\n",
           calls, chunks, (last_sent - first_asked) / 1e9, quantile_ms(&ttft, 0.5), quantile_ms(&ttft, 0.99), quantile_ms(&gap, 0.5),
           quantile_ms(&gap, 0.99));
    return 0;
}
