/* load PORT CLIENTS SECONDS MAILS EACH CUT FILE: each client sends the file, which ends in the final dot, MAILS
   times, EACH times per session, the last CUT octets by a write of their own; none begins after SECONDS, and what is
   under way then has 1 to 2 s.  Prints for each mail that was taken when it began, its connect included, and when its
   250 came. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static struct sockaddr_in server = {.sin_family = AF_INET};
static double start, seconds;
static long mails, each, cut, size;
static char *mail;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9 - start;
}

static int say(int fd, const char *text, long left) {
    for (long n; left > 0; text += n, left -= n)
        if ((n = write(fd, text, left)) <= 0) return 0;
    return 1;
}

static int heard(FILE *replies, char kind) {
    char line[1024];
    do
        if (!fgets(line, sizeof line, replies)) return 0;
    while (line[3] == '-');
    return line[0] == kind;
}

static int ask(FILE *replies, const char *line, char kind) {
    return say(fileno(replies), line, strlen(line)) && heard(replies, kind);
}

static int send_mail(FILE *replies) {
    return ask(replies, "MAIL FROM:<from@bench.test>\r\n", '2') && ask(replies, "RCPT TO:<to@bench.test>\r\n", '2')
        && ask(replies, "DATA\r\n", '3') && say(fileno(replies), mail, size - cut)
        && say(fileno(replies), mail + size - cut, cut) && heard(replies, '2');
}

static void *client(void *unused) {
    for (long sent = 0; sent < mails && now() < seconds;) {
        double begin = now();
        int fd = socket(AF_INET, SOCK_STREAM, 0);
        FILE *replies = fdopen(fd, "r");
        if (connect(fd, (struct sockaddr *)&server, sizeof server) == 0 && heard(replies, '2')
            && ask(replies, "EHLO bench\r\n", '2')) {
            for (long i = 0; i < each && sent < mails && now() < seconds && send_mail(replies); i++, sent++) {
                double end = now();
                printf("%.6f %.6f\n", begin, end);
                begin = end;
            }
            ask(replies, "QUIT\r\n", '2');
        }
        fclose(replies);
    }
    return unused;
}

int main(int argc, char **argv) {
    int clients = atoi(argv[2]);
    pthread_t threads[clients];
    FILE *file = fopen(argv[argc - 1], "r");
    signal(SIGPIPE, SIG_IGN);
    fseek(file, 0, SEEK_END);
    mail = malloc(size = ftell(file));
    rewind(file);
    if (fread(mail, 1, size, file) != size) return 1;
    server.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    server.sin_port = htons(atoi(argv[1]));
    seconds = atof(argv[3]);
    mails = atol(argv[4]);
    each = atol(argv[5]);
    cut = atol(argv[6]);
    start = now();
    struct timespec end;
    clock_gettime(CLOCK_REALTIME, &end);
    end.tv_sec += (long)seconds + 2;
    for (int i = 0; i < clients; i++) pthread_create(&threads[i], 0, client, 0);
    for (int i = 0; i < clients; i++) pthread_timedjoin_np(threads[i], 0, &end);
    return 0;
}
